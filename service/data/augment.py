"""Random views of a whole batch at once, on the device that holds it, with parameters drawn for each image.

Every draw is a function of (seed, epoch, sample id, view), so neither rank nor worker nor restart changes a view.
Crop, flip, shear and rotation are one bilinear resampling; the colour jitter, whose parts commute but for clipping, is
one 3×3 matrix and an offset. Distributions follow torchvision's RandomResizedCrop and ColorJitter, with the hue turned
in YIQ instead of HSV; `tests/numerics/test_augment.py` compares them.

Shape legend: B images, C = 3 channels, H×W source pixels, S side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from service.config import Augment, Data, Range
from service.data.draws import key, normal, uniform
from service.data.pixels import LUMA, affine, change, inside, resample
from service.data.randaugment import DRAWS, Operations, draw_operations, randaugment

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_CROP_TRIES = 10
_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_CROP_DRAWS = 2 * _CROP_TRIES + 2
_DRAWS = (_CROP_DRAWS, 3, 6, 3)  # crop; flip, rotation, shear; colour; blur, its width, solarize
_OPERATIONS, _ERASE, _NOISE = 1, 2, 3  # streams of further draws, which views without them need not make
_CACHED = 1 << 16  # pixels that a core's cache holds through all that happens to them


class ViewKind(NamedTuple):
    """Views of an image that share their augmentation and size, by number."""

    config: Augment
    size: int
    numbers: range


def view_kinds(data: Data, views: int) -> list[ViewKind]:
    """Global views 0 … `views` − 1, and the local crops after them where there are any."""
    kinds = [ViewKind(data.augment, data.image_size, range(views))]
    if data.local is not None:
        kinds.append(ViewKind(data.local_augment, data.local.size, range(views, views + data.local.count)))
    return kinds


class _Constants(NamedTuple):
    mean: Tensor
    std: Tensor
    luma: Tensor
    to_yiq: Tensor
    to_rgb: Tensor


@cache
def _constants(device: torch.device) -> _Constants:
    """Tensors on a device, made once: making one from numbers waits for the device."""
    yiq = torch.tensor(_YIQ)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return _Constants(*(t.to(device) for t in (mean, std, torch.tensor(LUMA), yiq, torch.linalg.inv(yiq))))


class _Parameters(NamedTuple):
    """What makes a view of each image; every first dimension is B."""

    theta: Tensor  # (B, 2, 3), from a view's coordinates to its image's, both in [−1, 1]
    flipped: Tensor  # (B,)
    matrix: Tensor  # (B, 3, 3), of RGB
    contrast: Tensor  # (B,)
    blurred: Tensor  # (B,)
    sigma: Tensor  # (B,), in pixels
    solarized: Tensor  # (B,)
    operation: Tensor  # (B, N), of RandAugment, with their levels and signs
    level: Tensor  # (B, N)
    sign: Tensor  # (B, N)
    erased: Tensor  # (B, 4): top, left, height and width of a rectangle in pixels of the view
    id: Tensor  # (B,), of the sample


def normalise(images: Tensor) -> Tensor:
    """Map images in [0, 1], (…, 3, H, W), to zero mean and unit variance by ImageNet's statistics."""
    constants = _constants(images.device)
    return (images - constants.mean) / constants.std


def resize_normalise(images_BCHW: Tensor, size: int) -> Tensor:
    """Turn uint8 images into the input of an encoder for evaluation: in [0, 1], resized to (size, size), normalised."""
    x = images_BCHW.float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return normalise(x)


def random_view(
    images: Tensor,
    ids_B: Tensor,
    *,
    config: Augment,
    size: int,
    seed: int,
    epoch: int,
    view: int,
    cropped: bool = False,
) -> Tensor:
    """Draw one view of each image.

    Args:
        images: uint8, (B, 3, H, W).
        ids_B: int64 sample ids on the same device, (B,).
        config: strengths and probabilities.
        size: side S of the view in pixels.
        seed: of the run.
        epoch: of the sample's source.
        view: number of the view; views of one image are independent.
        cropped: whether `images` are this view's crops already, (B, 3, S, S), as `crop_boxes` names them: then all but
            the crop is done.

    Returns:
        Normalised float32, (B, 3, S, S).
    """
    if config.three_augment > 0:
        config = config.model_copy(update=dict.fromkeys(("grey", "blur", "solarize"), config.three_augment / 3))
    draw = key(seed, epoch, view)
    of = _draw(draw, ids_B, config, images.shape[-2:], size, cropped)
    resampled = not cropped or config.rotate > 0 or config.shear > 0
    make = partial(_view, config=config, size=size, resampled=resampled, noise=key(draw, _NOISE))
    if images.device.type != "cpu":
        return make(images, of)
    last = not _recoloured(config) and images.is_contiguous(memory_format=torch.channels_last)
    views = _empty_views(len(images), size, last)
    together = max(1, _CACHED // size**2)
    for out, part, *of_part in zip(*(each.split(together) for each in (views, images, *of)), strict=True):
        out.copy_(make(part, _Parameters(*of_part)))
    return views


def draw_views(
    images: Tensor | Sequence[Tensor], ids_B: Tensor, kinds: Sequence[ViewKind], *, seed: int, epoch: int
) -> list[Tensor]:
    """Draw all views of each image.

    Args:
        images: uint8, (B, 3, H, W), or for each kind the crops that a reader has cut for it, (V, B, 3, S, S).
        ids_B: int64 sample ids on the same device.
        kinds: of views.
        seed: of the run.
        epoch: of the samples' source.

    Returns:
        For each kind normalised float32, (V, B, 3, S, S).
    """
    cropped = not isinstance(images, Tensor)
    drawn: list[Tensor] = []
    for place, (config, size, numbers) in enumerate(kinds):
        options = {"config": config, "size": size, "seed": seed, "epoch": epoch, "cropped": cropped}
        of_each = images[place] if cropped else [images] * len(numbers)
        drawn.append(
            torch.stack([random_view(one, ids_B, view=n, **options) for n, one in zip(numbers, of_each, strict=True)])
        )
    return drawn


def crop_boxes(
    ids_B: NDArray[np.int64],
    heights_B: NDArray[np.int64],
    widths_B: NDArray[np.int64],
    *,
    config: Augment,
    seed: int,
    epoch: int,
    view: int,
) -> NDArray[np.int64]:
    """Draw the crops of `random_view` for images of these sizes: top, left, height and width in pixels, (B, 4)."""
    draws = uniform(key(seed, epoch, view), torch.as_tensor(ids_B), _CROP_DRAWS)
    height, width = (torch.as_tensor(sides, dtype=torch.float32) for sides in (heights_B, widths_B))
    return torch.stack(_boxes(draws, config.crop_scale, config.crop_ratio, height, width), 1).to(torch.int64).numpy()


def _between(u: Tensor, low_high: tuple[float, float]) -> Tensor:
    return low_high[0] + u * (low_high[1] - low_high[0])


def _boxes(
    draws: Tensor, area_share: Range, aspect: Range, height: Tensor, width: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width (B,) in whole pixels: the first of ten draws that fits, else the whole image."""
    scale, log_ratio = draws[:, :_CROP_TRIES].T, draws[:, _CROP_TRIES : 2 * _CROP_TRIES].T
    area = _between(scale, area_share) * (height * width)
    low, high = (math.log(r) for r in aspect)
    ratio = torch.exp(_between(log_ratio, (low, high)))
    w, h = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    any_fits = fits.any(0)
    w = torch.where(any_fits, w.gather(0, first)[0], width)
    h = torch.where(any_fits, h.gather(0, first)[0], height)
    top = torch.floor(draws[:, 2 * _CROP_TRIES] * (height - h + 1))
    left = torch.floor(draws[:, 2 * _CROP_TRIES + 1] * (width - w + 1))
    return top, left, h, w


def _turns(u: Tensor, config: Augment) -> tuple[Tensor, Tensor, Tensor]:
    """Sign of the horizontal axis (−1 is a flip), rotation and horizontal shear in radians, (B,) each."""
    sign = torch.where(u[:, 0] < config.flip, -1.0, 1.0)
    angle, shear = (
        _between(u[:, 1 + i], (-math.radians(most), math.radians(most)))
        for i, most in enumerate((config.rotate, config.shear))
    )
    return sign, angle, shear


def _colours(u: Tensor, config: Augment) -> tuple[Tensor, Tensor]:
    """RGB matrices (B, 3, 3) and contrasts (B,): the jitter of the chosen images, then the loss of colour of some."""
    contrast, brightness, saturation, hue, jittered, greyed = u.unbind(1)
    matrix = colour_matrix(
        brightness=_factor(brightness, config.brightness),
        saturation=_factor(saturation, config.saturation),
        hue=_between(hue, (-config.hue, config.hue)),
    )
    chosen = jittered < config.jitter
    matrix = torch.where(chosen.view(-1, 1, 1), matrix, torch.eye(3, device=u.device))
    grey = (_constants(u.device).luma @ matrix)[:, None, :].expand(-1, 3, 3)
    matrix = torch.where((greyed < config.grey).view(-1, 1, 1), grey, matrix)
    return matrix, torch.where(chosen, _factor(contrast, config.contrast), 1.0)


def _effects(u: Tensor, config: Augment) -> tuple[Tensor, Tensor, Tensor]:
    """Which images are blurred, how far in pixels, which are solarized, (B,) each."""
    solarize = u[:, 2 if config.blur > 0 else 0]
    return u[:, 0] < config.blur, _between(u[:, 1], config.blur_sigma), solarize < config.solarize


def _operations(draw: int, ids: Tensor, config: Augment) -> Operations:
    chosen = config.randaugment
    if chosen is None:
        nothing = torch.empty(len(ids), 0, device=ids.device)
        return Operations(nothing, nothing, nothing)
    u = uniform(key(draw, _OPERATIONS), ids, chosen.ops * DRAWS)
    return draw_operations(u, chosen.magnitude, chosen.spread, chosen.probability)


def _erased(draw: int, ids: Tensor, config: Augment, size: int) -> Tensor:
    """Rectangles (B, 4) to erase of views, of no height where nothing is erased or no rectangle fits."""
    if config.erase == 0:
        return torch.zeros(len(ids), 4, device=ids.device)
    u = uniform(key(draw, _ERASE), ids, _CROP_DRAWS + 1)
    side = torch.full_like(u[:, 0], size)
    top, left, h, w = _boxes(u[:, 1:], config.erase_scale, config.erase_ratio, side, side)
    erased = (u[:, 0] < config.erase) & ((h < size) | (w < size))
    return torch.stack([top, left, torch.where(erased, h, 0), w], 1)


def _draw(draw: int, ids: Tensor, config: Augment, image: Sequence[int], size: int, cropped: bool) -> _Parameters:
    crop, turn, colour, effects = uniform(draw, ids, sum(_DRAWS)).split(_DRAWS, 1)
    height, width = image
    sides = [torch.full_like(crop[:, 0], side) for side in image]
    origin = torch.zeros_like(crop[:, 0])
    box = (origin, origin, *sides) if cropped else _boxes(crop, config.crop_scale, config.crop_ratio, *sides)
    turns = _turns(turn, config)
    theta = affine(*box, *turns, height, width)
    if config.three_augment > 0:  # grey, blur and solarize take thirds of one draw, end to end
        u, third = colour[:, -1], config.three_augment / 3
        effects = torch.stack([(u - third) % 1, effects[:, 1], (u - 2 * third) % 1], 1)
    return _Parameters(
        theta,
        turns[0] < 0,
        *_colours(colour, config),
        *_effects(effects, config),
        *_operations(draw, ids, config),
        _erased(draw, ids, config, size),
        ids,
    )


def _empty_views(count: int, size: int, channels_last: bool) -> Tensor:
    """Make (count, 3, size, size) by NumPy, which asks for huge pages: touching small ones costs as much as a view."""
    memory = torch.from_numpy(np.empty(count * 3 * size**2, np.float32))
    if channels_last:
        return memory.view(count, size, size, 3).permute(0, 3, 1, 2)
    return memory.view(count, 3, size, size)


def _recoloured(config: Augment) -> bool:
    return config.jitter > 0 or config.grey > 0 or config.randaugment is not None


def _view(images: Tensor, of: _Parameters, *, config: Augment, size: int, resampled: bool, noise: int) -> Tensor:
    """Make the views that `of` describes; those that are not resampled are flipped at most."""
    images = images.contiguous() if _recoloured(config) else images  # colours are mixed plane by plane
    x = resample(images.float(), of.theta, size) if resampled else change(_flip, images, of.flipped).float()
    if config.randaugment is not None:
        x = randaugment(x, Operations(of.operation, of.level, of.sign))
    x = _recolour(x, of.matrix, of.contrast, config) if _recoloured(config) else _normalise_bytes(x)
    if config.blur > 0:
        x = change(_blur, x, of.blurred, of.sigma)
    if config.solarize > 0:
        x = change(_solarize, x, of.solarized)
    if config.erase > 0:
        x = change(partial(_erase, noise=noise), x, of.erased[:, 2] > 0, of.erased, of.id)
    return x


def _recolour(x: Tensor, matrix: Tensor, contrast: Tensor, config: Augment) -> Tensor:
    """Normalised colours of images in [0, 255]: jitter, grey and normalisation are one matrix and an offset."""
    constants = _constants(x.device)
    mean, std = constants.mean.view(3, 1), constants.std.view(3, 1)
    pixels = x.flatten(2)
    offset = (-mean / std).expand(len(x), 3, 1)
    if config.jitter and config.contrast:
        luma = (constants.luma @ matrix)[:, None, :] @ pixels.mean(2, keepdim=True) / 255
        offset = torch.addcmul(offset, 1 - contrast.view(-1, 1, 1), luma / std)  # ColorJitter blends with mean luma
    x = torch.baddbmm(offset, contrast.view(-1, 1, 1) * matrix / (255 * std), pixels).view_as(x)
    if config.jitter:
        for channel, m, s in zip(x.unbind(1), MEAN, STD, strict=True):
            channel.clamp_(-m / s, (1 - m) / s)  # of [0, 1]
    return x


def _normalise_bytes(x: Tensor) -> Tensor:
    """Normalise images in [0, 255] in place."""
    scale, shift = _row_factors(x.device, x.shape[-1], x.is_contiguous(memory_format=torch.channels_last))
    return x.mul_(scale).add_(shift)


@cache
def _row_factors(device: torch.device, width: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Scale and shift (1, 3, 1, W) that normalise bytes, laid out like a row of the image: so a CPU runs along it."""
    constants = _constants(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    factors = 1 / (255 * constants.std), -constants.mean / constants.std
    scale, shift = (each.expand(1, 3, 1, width).contiguous(memory_format=layout) for each in factors)
    return scale, shift


def _flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _solarize(x: Tensor) -> Tensor:
    """Invert normalised values that stand for 1/2 and more."""
    mean, std = _constants(x.device)[:2]
    return torch.where(x >= (0.5 - mean) / std, (1 - 2 * mean) / std - x, x)


def _erase(x: Tensor, box: Tensor, ids: Tensor, *, noise: int) -> Tensor:
    """Put normal noise, of the views' mean and variance, in place of rectangles (B, 4) (Zhong et al. 2020)."""
    drawn = normal(uniform(noise, ids, x[0].numel())).view_as(x)
    return torch.where(inside(box, x.shape[-1]), drawn, x)


def _factor(u: Tensor, strength: float) -> Tensor:
    return _between(u, (max(0.0, 1 - strength), 1 + strength))


def colour_matrix(*, brightness: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Fold brightness, saturation and hue (in turns) of each image, (B,) each, into RGB matrices (B, 3, 3)."""
    constants = _constants(brightness.device)
    angle = 2 * math.pi * hue
    cos, sin, one, zero = torch.cos(angle), torch.sin(angle), torch.ones_like(hue), torch.zeros_like(hue)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    turn[:, 1:] *= saturation.view(-1, 1, 1)  # chroma scaled about the luma is the saturation blend
    return brightness.view(-1, 1, 1) * (constants.to_rgb @ turn @ constants.to_yiq)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur images by a separable Gaussian of each one's own `sigma` in pixels."""
    batch, channels, height, width = x.shape
    radius = max(1, min(height, width) // 20)  # a kernel of a tenth of the image, as in SimCLR
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-offsets.square() / (2 * sigma.view(-1, 1) ** 2), 1).repeat_interleave(channels, 0)
    y = F.pad(x.reshape(1, batch * channels, height, width), [radius] * 4, mode="reflect")
    y = F.conv2d(y, kernel[:, None, :, None], groups=batch * channels)
    return F.conv2d(y, kernel[:, None, None, :], groups=batch * channels).view_as(x)
