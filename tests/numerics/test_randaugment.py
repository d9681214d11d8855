"""Each operation against timm's on PIL images, then what is drawn of them."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from service.config import RandAugment
from service.data import augment
from service.data.draws import key, normal, uniform
from service.data.randaugment import DRAWS, OPERATIONS, Operations, draw_operations, randaugment
from tests.numerics.test_augment import pixels, view

TIMM = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "saturation": "ColorIncreasing",
    "sharpness": "SharpnessIncreasing",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
STILL = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grey": 0.0, "solarize": 0.0}


def theirs(name, image, level, sign, monkeypatch):
    """timm's operation on one (3, H, W) uint8 image, at a level out of 10."""
    monkeypatch.setattr(random, "random", lambda: 1.0 if sign < 0 else 0.0)
    to_args = auto_augment.LEVEL_TO_ARG[TIMM[name]]
    args = to_args(level, {}) if to_args else ()
    options = {"fillcolor": (124, 116, 104), "resample": Image.BILINEAR}
    changed = auto_augment.NAME_TO_OP[TIMM[name]](Image.fromarray(image.permute(1, 2, 0).numpy()), *args, **options)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1).float()


def ours(name, images, level, sign):
    number = torch.full((len(images), 1), OPERATIONS.index(name))
    of = Operations(number, torch.full((len(images), 1), level / 10), torch.full((len(images), 1), float(sign)))
    return randaugment(images.float(), of)


@pytest.mark.parametrize("level, sign", [(9, 1), (9, -1), (4.5, 1)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_timms(name, level, sign, monkeypatch):
    images = torch.cat([pixels(2, side=40, seed=5), pixels(1, side=40, seed=6) // 3 + 20])
    got = ours(name, images, level, sign)
    expected = torch.stack([theirs(name, image, level, sign, monkeypatch) for image in images])
    error = (got - expected).abs()
    if name in GEOMETRIC:  # at the seam PIL takes the one side or the other, and we a mean
        assert (error > 3).float().mean() < 0.06 and error.median() < 0.6
    else:
        assert error.max() < 2 and error.mean() < 0.8  # PIL drops fractions, of what it blends with as well
    assert (got - images).abs().max() > 2


def test_equalize_and_autocontrast_leave_flat_channels():
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    for name in ("equalize", "autocontrast"):
        assert torch.equal(ours(name, flat, 9, 1), flat.float())


def test_every_operation_is_drawn_alike_at_its_level():
    count = 30_000
    of = draw_operations(uniform(key(1), torch.arange(count), 2 * DRAWS), magnitude=9.0, spread=0.5, probability=0.5)
    assert of.number.shape == (count, 2)
    shares = torch.bincount(of.number.flatten(), minlength=16) / (2 * count)
    assert len(shares) == len(OPERATIONS) + 1 == 16
    torch.testing.assert_close(shares[:15], torch.full((15,), 0.5 / 15), atol=0.003, rtol=0)
    assert of.level.max() == 1 and abs(of.level.median() - 0.9) < 0.002
    inner = normal(torch.linspace(0.001, 0.9, 1000)) * 0.05 + 0.9
    assert abs(of.level.quantile(0.1) - torch.quantile(inner[inner < 1], 0.11)) < 0.01
    assert abs(of.sign.mean()) < 0.02
    assert abs(torch.corrcoef(of.number.T.float())[0, 1]) < 0.02


def test_normals_are_standard_and_finite():
    x = normal(uniform(key(5), torch.arange(2000), 100)).flatten()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert torch.isfinite(normal(torch.tensor([0.0, 1 - 2.0**-24]))).all()


def test_views_follow_the_operations_and_need_no_company():
    images = pixels(24, seed=1)
    chosen = {"randaugment": RandAugment(probability=1.0)}
    plain, changed = view(images, **STILL), view(images, **STILL, **chosen)
    assert ((plain - changed).abs().amax((1, 2, 3)) > 1e-3).float().mean() > 0.9
    torch.testing.assert_close(view(images[7:], torch.arange(7, 24), **STILL, **chosen), changed[7:])


@pytest.mark.parametrize("option, value", [("ops", 4), ("magnitude", 3.0), ("spread", 3.0), ("probability", 1.0)])
def test_each_option_acts(option, value):
    images = pixels(32, seed=1)
    base = view(images, **STILL, randaugment=RandAugment())
    assert not torch.equal(base, view(images, **STILL, randaugment=RandAugment(**{option: value})))


def test_a_batch_changes_as_much_as_timms(monkeypatch):
    images = pixels(400, side=24, seed=8)
    random.seed(0)
    np.random.seed(0)
    transform = auto_augment.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104), "interpolation": Image.BILINEAR}
    )
    changed = [np.array(transform(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images]
    expected = torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2) / 255
    got = view(images, **STILL, randaugment=RandAugment())
    for statistic in (lambda x: x.mean(), lambda x: x.std(), lambda x: x.std((2, 3)).mean()):
        torch.testing.assert_close(statistic(got), statistic(expected), atol=0.02, rtol=0.03)
    a, b = (((x - images / 255).abs().mean((1, 2, 3)) * 20).int().clamp(max=9) for x in (got, expected))
    a, b = (torch.bincount(x, minlength=10) / 400 for x in (a, b))
    assert (a - b).abs().max() < 0.06


def test_off_changes_nothing():
    images = pixels(4)
    options = {"config": augment.Augment(), "size": 24, "seed": 3, "epoch": 1, "view": 0}
    nothing = augment.Augment(randaugment=RandAugment(probability=0.0))
    plain = augment.random_view(images, torch.arange(4), **options)
    same = augment.random_view(images, torch.arange(4), **options | {"config": nothing})
    torch.testing.assert_close(plain, same, atol=1e-6, rtol=0)
