"""Batch augmentation against torchvision's per-image transforms: same parameters, same pixels, same distribution."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from service.config import Augment, Data
from service.data import augment
from service.data import pixels as pixels_of
from service.data.draws import hash_numpy, hash_torch, key, uniform
from tests.bench.image_step import published_view

OFF = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "solarize": 0.0}


def pixels(count=1, side=24, seed=0):
    """Smooth random images: neighbouring pixels are alike, as in photos."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def view(images, ids=None, size=None, **options):
    config = Augment(**options)
    ids = torch.arange(len(images)) if ids is None else ids
    out = augment.random_view(images, ids, config=config, size=size or images.shape[-1], seed=3, epoch=1, view=0)
    constants = augment._constants(out.device)
    return out * constants.std + constants.mean


def test_draws_are_the_same_bits_in_numpy_and_torch():
    counters = np.arange(-500, 500)
    expected = hash_numpy(key(1, 2, 3), counters)
    np.testing.assert_array_equal(hash_torch(key(1, 2, 3), torch.tensor(counters)).numpy().view(np.uint64), expected)


def test_draws_are_uniform_and_uncorrelated():
    u = uniform(key(0, 1), torch.arange(200_000), 6)
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.003
    assert (u.var(0) - 1 / 12).abs().max() < 0.001
    assert (torch.corrcoef(u.T) - torch.eye(6)).abs().max() < 0.01


def test_a_view_depends_on_the_sample_not_on_its_batch():
    images = pixels(8)
    whole = view(images)
    part = view(images[5:], torch.arange(5, 8))
    assert torch.equal(whole[5:], part)
    config = Augment()
    args = {"config": config, "size": 24, "seed": 3}
    first = augment.random_view(images, torch.arange(8), epoch=1, view=0, **args)
    for change in ({"epoch": 2, "view": 0}, {"epoch": 1, "view": 1}):
        assert not torch.equal(first, augment.random_view(images, torch.arange(8), **change, **args))


def resampled(image, *warp):
    return pixels_of.resample(image, pixels_of.affine(*warp, *image.shape[-2:]), 24)


def test_a_crop_equals_cut_and_interpolate():
    image = pixels().float() / 255
    one = torch.ones(1)
    got = resampled(image, 3 * one, 5 * one, 10 * one, 14 * one, one, 0 * one, 0 * one)
    expected = F.interpolate(image[..., 3:13, 5:19], (24, 24), mode="bilinear", align_corners=False)
    inner = (..., slice(2, -2), slice(2, -2))  # at its border a cut image repeats its edge, ours sees beyond
    torch.testing.assert_close(got[inner], expected[inner], atol=1e-5, rtol=0)


def test_flip_mirrors_and_rotation_turns_like_torchvision():
    image = pixels().float() / 255
    zero, one = torch.zeros(1), torch.ones(1)
    flipped = resampled(image, zero, zero, 24 * one, 24 * one, -one, zero, zero)
    torch.testing.assert_close(flipped, image.flip(-1), atol=1e-5, rtol=0)
    turned = resampled(image, zero, zero, 24 * one, 24 * one, one, torch.full((1,), np.pi / 2), zero)
    assert min((turned - image.rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 1e-4


def test_shear_slants_like_torchvision():
    image = pixels().float() / 255
    zero, one = torch.zeros(1), torch.ones(1)
    slanted = resampled(image, zero, zero, 24 * one, 24 * one, one, zero, torch.full((1,), np.radians(20)))
    bilinear = v2.InterpolationMode.BILINEAR
    candidates = [
        v2.functional.affine(image, 0, [0, 0], 1, [degrees, 0], interpolation=bilinear) for degrees in (20, -20)
    ]
    middle = (..., slice(6, 18), slice(6, 18))
    assert min((slanted[middle] - c[middle]).abs().max() for c in candidates) < 2e-3


def test_crop_boxes_follow_torchvision():
    count, size = 6000, 32
    config = Augment(crop_scale=(0.2, 1.0))
    sides = np.full(count, size)
    ours = augment.crop_boxes(np.arange(count), sides, sides, config=config, seed=5, epoch=0, view=0).astype(float)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0))
    image = torch.zeros(3, size, size)
    params = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params], float)
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.35)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.06)
    for column in range(4):
        a, b = (np.histogram(x[:, column], bins=8, range=(0, size + 1))[0] / count for x in (ours, theirs))
        assert np.abs(a - b).max() < 0.03
    np.testing.assert_allclose(np.corrcoef(ours.T), np.corrcoef(theirs.T), atol=0.06)


def test_the_reader_crops_where_a_whole_batch_view_does():
    images, ids = pixels(32, side=64), torch.arange(32)
    draw = {"seed": 3, "epoch": 1, "view": 1}
    config = Augment(rotate=0.0)
    sides = np.full(32, 64)
    boxes = augment.crop_boxes(ids.numpy(), sides, sides, config=config, **draw)
    assert len(np.unique(boxes, axis=0)) == 32
    crops = [
        F.interpolate(image[None, :, t : t + h, left : left + w].float(), (64, 64), mode="bilinear")[0].round().byte()
        for image, (t, left, h, w) in zip(images, boxes, strict=True)
    ]
    whole = augment.random_view(images, ids, config=config, size=64, **draw)
    ours = augment.random_view(torch.stack(crops), ids, config=config, size=64, cropped=True, **draw)
    inner = (..., slice(4, -4), slice(4, -4))  # a cut image repeats its edge
    assert (whole[inner] - ours[inner]).abs().max() < 0.05


def test_boxes_of_images_of_many_sizes_stay_inside_and_need_no_company():
    rng = np.random.default_rng(0)
    ids, heights, widths = rng.integers(1 << 40, size=500), *rng.integers(1, 3000, (2, 500))
    draw = {"config": Augment(crop_scale=(0.05, 1.0)), "seed": 0, "epoch": 2, "view": 1}
    boxes = augment.crop_boxes(ids, heights, widths, **draw)
    top, left, height, width = boxes.T
    assert boxes.dtype == np.int64 and (boxes >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()
    alone = [augment.crop_boxes(ids[i : i + 1], heights[i : i + 1], widths[i : i + 1], **draw)[0] for i in range(500)]
    np.testing.assert_array_equal(alone, boxes)


def jittered(theirs, images, **options):
    torch.manual_seed(0)
    expected = torch.stack([theirs(image.float() / 255) for image in images])
    got = view(images, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **OFF | {"jitter": 1.0} | options)
    return got, expected


@pytest.mark.parametrize(
    "name, strength", [("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.4), ("hue", 0.1)], ids=lambda v: str(v)
)
def test_each_jitter_spreads_like_torchvision(name, strength):
    others = {n: 0.0 for n in ("brightness", "contrast", "saturation", "hue")} | {name: strength}
    image = pixels(seed=4).expand(1500, -1, -1, -1)
    got, expected = jittered(v2.ColorJitter(**others), image, **others)
    axes = (2, 3)
    torch.testing.assert_close(got.mean((0, *axes)), expected.mean((0, *axes)), atol=0.012, rtol=0)
    spread_got, spread_expected = got.mean(axes).std(0), expected.mean(axes).std(0)
    torch.testing.assert_close(spread_got, spread_expected, atol=0.01, rtol=0.15)
    torch.testing.assert_close(got.std(axes).mean(0), expected.std(axes).mean(0), atol=0.012, rtol=0.05)


def test_the_default_jitter_spreads_like_torchvision():
    images = pixels(1500, side=8, seed=7)
    got, expected = jittered(v2.ColorJitter(0.4, 0.4, 0.2, 0.1), images)
    for statistic in (lambda x: x.mean((0, 2, 3)), lambda x: x.std((0, 2, 3)), lambda x: x.std((2, 3)).mean(0)):
        torch.testing.assert_close(statistic(got), statistic(expected), atol=0.015, rtol=0.05)
    a, b = (torch.histc(x, 10, 0, 1) / x.numel() for x in (got, expected))
    assert (a - b).abs().max() < 0.02


def histogram(values, low, high):
    return np.histogram(values, bins=10, range=(low, high))[0] / len(values)


def test_jitter_factors_are_drawn_like_torchvisions():
    count, config = 6000, Augment(jitter=1.0, grey=0.0)
    torch.manual_seed(0)
    jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    factors = [jitter.make_params([]) for _ in range(count)]
    matrices, contrast = augment._colours(uniform(key(4), torch.arange(count), 6), config)
    luma = torch.tensor(pixels_of.LUMA)
    brightness = luma @ matrices @ torch.ones(3)  # grey stays grey under saturation and hue
    yiq = augment._constants(matrices.device).to_yiq @ matrices @ augment._constants(matrices.device).to_rgb
    saturation = torch.hypot(yiq[:, 1, 1], yiq[:, 2, 1]) / brightness
    hue = torch.atan2(yiq[:, 2, 1], yiq[:, 1, 1]) / (2 * np.pi)
    ours = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    for name, values in ours.items():
        theirs = np.array([each[f"{name}_factor"] for each in factors], float)
        low, high = getattr(jitter, name)
        assert low - 1e-4 <= values.min() and values.max() <= high + 1e-4
        assert np.abs(histogram(values, low, high) - histogram(theirs, low, high)).max() < 0.025, name


def test_whole_views_spread_like_torchvisions():
    images = pixels(1500, side=32, seed=9)
    torch.manual_seed(0)
    transform = published_view()
    expected = torch.stack([transform(to_pil_image(image)) for image in images])
    got = augment.random_view(images, torch.arange(1500), config=Augment(), size=32, seed=3, epoch=0, view=1)
    for statistic in (lambda x: x.mean((0, 2, 3)), lambda x: x.std((0, 2, 3)), lambda x: x.std((2, 3)).mean(0)):
        torch.testing.assert_close(statistic(got), statistic(expected), atol=0.06, rtol=0.03)
    a, b = (torch.histc(x, 10, -2, 2.5) / x.numel() for x in (got, expected))
    assert (a - b).abs().max() < 0.015


@pytest.mark.parametrize("name", ["flip", "grey", "solarize", "jitter"])
def test_probabilities_are_kept(name):
    image = pixels(seed=2).expand(4000, -1, -1, -1)
    options = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)} | OFF
    plain = view(image[:1], **options)
    changed = (view(image, **options | {name: 0.3}) - plain).abs().amax((1, 2, 3)) > 1e-3
    assert abs(changed.float().mean().item() - 0.3) < 0.03


def test_grey_and_solarize_equal_torchvision():
    image = pixels(seed=3)
    options = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)} | OFF
    grey = view(image, **options | {"grey": 1.0})
    torch.testing.assert_close(grey, v2.functional.rgb_to_grayscale(image.float() / 255, 3), atol=2e-3, rtol=0)
    solarized = view(image, **options | {"solarize": 1.0})
    torch.testing.assert_close(solarized, v2.functional.solarize(image.float() / 255, 0.5), atol=2e-3, rtol=0)


def test_blur_equals_torchvision():
    image = pixels(side=40)
    options = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)} | OFF
    blurred = view(image, **options | {"blur": 1.0, "blur_sigma": (1.2, 1.2)})
    expected = v2.functional.gaussian_blur(image.float() / 255, [5, 5], [1.2, 1.2])
    torch.testing.assert_close(blurred, expected, atol=2e-3, rtol=0)
    assert (blurred - image / 255).abs().max() > 0.01


def test_rotation_stays_within_its_bound():
    draws = uniform(key(9), torch.arange(5000), 5)
    sign, angle, shear = augment._turns(draws, Augment(rotate=15, shear=10, flip=0.5))
    assert angle.abs().max() <= np.radians(15) and angle.abs().max() > np.radians(14.5)
    assert shear.abs().max() <= np.radians(10) and shear.abs().max() > np.radians(9.5)
    assert abs(torch.corrcoef(torch.stack([angle, shear]))[0, 1]) < 0.05
    assert abs((sign < 0).float().mean().item() - 0.5) < 0.03


ERASE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)} | OFF


def test_erased_rectangles_are_drawn_like_torchvisions():
    count, size = 5000, 32
    image = torch.zeros(3, size, size)
    torch.manual_seed(0)
    eraser = v2.RandomErasing(p=1.0, scale=(0.02, 1 / 3), ratio=(0.3, 3.3))
    params = [eraser.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["i"], p["j"], p["h"], p["w"]] for p in params], float)
    drawn = augment._erased(key(1), torch.arange(count), Augment(erase=1.0), size).numpy()
    np.testing.assert_allclose(drawn.mean(0), theirs.mean(0), rtol=0.03)
    np.testing.assert_allclose(drawn.std(0), theirs.std(0), rtol=0.05)
    assert (drawn[:, 2] > 0).all() and (drawn[:, :2] + drawn[:, 2:]).max() <= size
    some = augment._erased(key(1), torch.arange(count), Augment(erase=0.25), size).numpy()
    assert abs((some[:, 2] > 0).mean() - 0.25) < 0.02


def test_erasing_puts_noise_into_a_rectangle_alone():
    images = pixels(64)
    plain, erased = (view(images, **ERASE, erase=p) for p in (0.0, 0.5))
    boxes = augment._erased(key(3, 1, 0), torch.arange(64), Augment(erase=0.5), 24)
    assert 20 < (boxes[:, 2] > 0).sum() < 44
    constants = augment._constants(images.device)
    for before, after, (top, left, h, w) in zip(plain, erased, boxes.int().tolist(), strict=True):
        differs = (before != after).any(0)
        assert differs[top : top + h, left : left + w].float().mean() > 0.99 or not h
        assert differs.sum() <= h * w
    noise = ((erased - constants.mean) / constants.std)[(plain != erased).any(1, keepdim=True).expand_as(plain)]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    for other in ({"erase_scale": (0.1, 0.1)}, {"erase_ratio": (3.0, 3.0)}):
        assert not torch.equal(erased, view(images, **ERASE, erase=0.5, **other))


def test_three_augment_takes_exactly_one_of_three():
    image = pixels(seed=2, side=24).expand(800, -1, -1, -1)
    one = {name: view(image[:1], **ERASE | {name: 1.0}) for name in ("grey", "solarize")}
    plain = view(image[:1], **ERASE)
    strong = {"blur_sigma": (1.0, 2.0)}
    got = view(image, **ERASE, **strong, three_augment=0.9)

    def share(like):
        return ((got - like).abs().amax((1, 2, 3)) < 1e-3).float().mean().item()

    shares = {"grey": share(one["grey"]), "solarize": share(one["solarize"]), "none": share(plain)}
    np.testing.assert_allclose([*shares.values()], [0.3, 0.3, 0.1], atol=0.05)
    blurred = view(image[:50], **ERASE | strong | {"blur": 1.0}) - plain
    assert blurred.abs().amax((1, 2, 3)).min() > 1e-3


def test_local_crops_are_small_and_each_its_own():
    data = Data(uri="none", image_size=24, local={"count": 3, "size": 12, "crop_scale": (0.05, 0.3)})
    kinds = augment.view_kinds(data, 2)
    ids = torch.arange(500)
    views, local = augment.draw_views(pixels(500), ids, kinds, seed=3, epoch=1)
    assert views.shape == (2, 500, 3, 24, 24) and local.shape == (3, 500, 3, 12, 12)
    alone = augment.view_kinds(data.model_copy(update={"local": None}), 2)
    assert torch.equal(augment.draw_views(pixels(500), ids, alone, seed=3, epoch=1)[0], views)
    shapes = np.full(500, 200)
    areas = []
    for crop in kinds[1].numbers:
        boxes = augment.crop_boxes(ids.numpy(), shapes, shapes, config=kinds[1].config, seed=3, epoch=1, view=crop)
        areas.append(boxes[:, 2] * boxes[:, 3] / 200**2)
    areas = np.stack(areas)
    assert 0.045 < areas.min() < 0.07 and 0.28 < areas.max() < 0.305 and abs(areas.mean() - 0.175) < 0.01
    assert np.abs(np.corrcoef(areas) - np.eye(3)).max() < 0.15
