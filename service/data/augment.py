"""Random views of a whole batch at once, on the device that holds it, with parameters drawn for each image.

Every draw is a function of (seed, epoch, sample id, view), so neither rank nor worker nor restart changes a view.
Crop, flip, shear and rotation are one bilinear resampling; the colour jitter, whose parts commute but for clipping, is
one 3×3 matrix and an offset. Distributions follow torchvision's RandomResizedCrop and ColorJitter, with the hue turned
in YIQ instead of HSV; `tests/numerics/test_augment.py` compares them.

Shape legend: B images, C = 3 channels, H×W source pixels, S side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from service.config import Augment
from service.data.draws import key, uniform

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in PIL and torchvision
_CROP_TRIES = 10
_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_CROP_DRAWS = 2 * _CROP_TRIES + 2
_DRAWS = _CROP_DRAWS + 13


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
    draws = uniform(key(seed, epoch, view), ids_B, _DRAWS)
    x = images.float() / 255
    if cropped:
        boxes = (0.0, 0.0, float(size), float(size))
        box = torch.tensor(boxes, device=x.device).expand(len(x), 4).unbind(1)
    else:
        height, width = (torch.full_like(draws[:, 0], side) for side in x.shape[-2:])
        box = _crop_boxes(draws, config, height, width)
    rest = iter(draws[:, _CROP_DRAWS:].unbind(1))
    sign, angle, shear = _turns(rest, config)
    if cropped and not (config.rotate or config.shear):
        x = torch.where(sign.view(-1, 1, 1, 1) < 0, x.flip(-1), x)
    else:
        x = resample(x, *box, sign, angle, shear, size)
    x = _colour(x, rest, config)
    if config.blur > 0:
        x = _blur(x, next(rest) < config.blur, _between(next(rest), config.blur_sigma))
    if config.solarize > 0:
        chosen = next(rest) < config.solarize
        x = torch.where(chosen.view(-1, 1, 1, 1) & (x >= 0.5), 1 - x, x)
    return normalise(x)


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
    return torch.stack(_crop_boxes(draws, config, height, width), 1).to(torch.int64).numpy()


def _between(u: Tensor, low_high: tuple[float, float]) -> Tensor:
    return low_high[0] + u * (low_high[1] - low_high[0])


def _crop_boxes(draws: Tensor, config: Augment, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width (B,) in whole pixels: the first of ten draws that fits, else the whole image."""
    scale, log_ratio = draws[:, :_CROP_TRIES].T, draws[:, _CROP_TRIES : 2 * _CROP_TRIES].T
    area = _between(scale, config.crop_scale) * (height * width)
    low, high = (math.log(r) for r in config.crop_ratio)
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


def _turns(draws: Iterator[Tensor], config: Augment) -> tuple[Tensor, Tensor, Tensor]:
    """Sign of the horizontal axis (−1 is a flip), rotation and horizontal shear in radians, (B,) each."""
    sign = torch.where(next(draws) < config.flip, -1.0, 1.0)
    angle, shear = (
        _between(next(draws), (-math.radians(most), math.radians(most))) for most in (config.rotate, config.shear)
    )
    return sign, angle, shear


def resample(
    x_BCHW: Tensor,
    top: Tensor,
    left: Tensor,
    h: Tensor,
    w: Tensor,
    sign: Tensor,
    angle: Tensor,
    shear: Tensor,
    size: int,
) -> Tensor:
    """Cut, flip, shear, turn and scale each image bilinearly to (size, size); outside an image its edge is repeated.

    The result of a plain crop equals cutting it out and calling `interpolate(…, mode="bilinear")` on it.
    """
    height, width = x_BCHW.shape[-2:]
    cos, sin, slant = torch.cos(angle), torch.sin(angle), torch.tan(shear)
    to_x, to_y = w / width, h / height
    theta = torch.stack(
        [
            torch.stack([sign * cos * to_x, (cos * slant - sin) * to_x, (2 * left + w) / width - 1], -1),
            torch.stack([sign * sin * to_y, (sin * slant + cos) * to_y, (2 * top + h) / height - 1], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [len(x_BCHW), 3, size, size], align_corners=False)
    return F.grid_sample(x_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _colour(x: Tensor, draws: Iterator[Tensor], config: Augment) -> Tensor:
    """Jitter brightness, contrast, saturation and hue of the chosen images, then drop the colour of some."""
    contrast = _factor(next(draws), config.contrast)
    matrix = colour_matrix(
        brightness=_factor(next(draws), config.brightness),
        saturation=_factor(next(draws), config.saturation),
        hue=_between(next(draws), (-config.hue, config.hue)),
    )
    jittered = next(draws) < config.jitter
    identity = torch.eye(3, device=x.device)
    matrix = torch.where(jittered.view(-1, 1, 1), matrix, identity)
    contrast = torch.where(jittered, contrast, 1.0)
    greyed = (next(draws) < config.grey).view(-1, 1, 1)
    luma = _constants(x.device).luma
    matrix = torch.where(greyed, (luma @ matrix)[:, None, :].expand(-1, 3, 3), matrix)
    y = torch.bmm(matrix, x.flatten(2))
    mean = (luma @ y.mean(2).T).view(-1, 1, 1)  # of luma, as ColorJitter's contrast blends with
    c = contrast.view(-1, 1, 1)
    return (c * y + (1 - c) * mean).clamp(0, 1).view_as(x)


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


def _blur(x: Tensor, chosen: Tensor, sigma: Tensor) -> Tensor:
    """Blur the chosen images by a separable Gaussian of each image's own `sigma` in pixels."""
    batch, channels, height, width = x.shape
    radius = max(1, min(height, width) // 20)  # a kernel of a tenth of the image, as in SimCLR
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-offsets.square() / (2 * sigma.view(-1, 1) ** 2), 1).repeat_interleave(channels, 0)
    y = F.pad(x.reshape(1, batch * channels, height, width), [radius] * 4, mode="reflect")
    y = F.conv2d(y, kernel[:, None, :, None], groups=batch * channels)
    y = F.conv2d(y, kernel[:, None, None, :], groups=batch * channels)
    return torch.where(chosen.view(-1, 1, 1, 1), y.view_as(x), x)
