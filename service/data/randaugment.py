"""RandAugment of a whole batch (Cubuk et al. 2020, arXiv 1909.13719), by the operations and strengths that DeiT takes.

Every operation gets stronger with its level in [0, 1] (timm's `rand-…-inc1`). Those that map the values of a channel
one by one are a table of 256 values for each image and channel, so that one look-up applies any of them.

Shape legend: B images with values in [0, 255], C = 3 channels, N operations one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from service.data.draws import normal
from service.data.pixels import LUMA, change, resample

_FILL = (124.0, 116.0, 104.0)  # ImageNet's mean colour, where a geometric operation looks outside the image


class Operations(NamedTuple):
    """What happens to each image, (B, N) each."""

    number: Tensor  # int64, position in `OPERATIONS`; len(OPERATIONS) is none
    level: Tensor  # in [0, 1]
    sign: Tensor  # −1 or 1, of operations that go either way


class _Of(NamedTuple):
    """What a table of values depends on; broadcasts to (B, 3, 256)."""

    values: Tensor  # 0 … 255
    counts: Tensor  # (B, 3, 256), pixels of each value
    luma: Tensor  # (B, 1, 1), mean
    level: Tensor  # (B, 1, 1)
    sign: Tensor  # (B, 1, 1)


def _autocontrast(of: _Of) -> Tensor:
    seen = of.counts > 0
    low = torch.where(seen, of.values, 255.0).amin(2, keepdim=True)
    high = torch.where(seen, of.values, 0.0).amax(2, keepdim=True)
    return torch.where(high > low, (of.values - low) * 255 / (high - low).clamp(min=1), of.values)


def _equalize(of: _Of) -> Tensor:
    """As PIL: cumulative counts over a 255th of all but the highest value's."""
    below = of.counts.cumsum(2) - of.counts
    last = torch.where(of.counts > 0, of.values, -1.0).argmax(2, keepdim=True)
    step = below.gather(2, last) // 255
    return torch.where(step > 0, ((step // 2 + below) // step.clamp(min=1)).float(), of.values)


def _posterize(of: _Of) -> Tensor:
    lost = 2.0 ** (4 + torch.floor(4 * of.level))  # the lowest 4 to 8 bits
    return torch.floor(of.values / lost) * lost


def _solarize(of: _Of) -> Tensor:
    return torch.where(of.values < 256 - torch.floor(256 * of.level), of.values, 255 - of.values)


def _solarize_add(of: _Of) -> Tensor:
    return torch.where(of.values < 128, of.values + torch.floor(110 * of.level), of.values)


def _factor(level: Tensor, sign: Tensor) -> Tensor:
    """Of a blend with what an operation takes away: 1 changes nothing."""
    return (1 + 0.9 * sign * level).clamp(min=0.1)


_TABLES: dict[str, Callable[[_Of], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": lambda of: 255 - of.values,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "contrast": lambda of: torch.lerp(of.luma, of.values, _factor(of.level, of.sign)),
    "brightness": lambda of: of.values * _factor(of.level, of.sign),
}
_COLOURS = ("saturation", "sharpness")
_MOVES: dict[str, Callable[[Tensor], tuple[Tensor | float, ...]]] = {  # of the signed level: matrix, row by row
    "rotate": lambda t: (torch.cos(a := t * math.pi / 6), -torch.sin(a), 0.0, torch.sin(a), torch.cos(a), 0.0),
    "shear_x": lambda t: (1.0, 0.3 * t, 0.3 * t, 0.0, 1.0, 0.0),  # about the first pixel's corner, as in PIL
    "shear_y": lambda t: (1.0, 0.0, 0.0, 0.3 * t, 1.0, 0.3 * t),
    "translate_x": lambda t: (1.0, 0.0, 0.9 * t, 0.0, 1.0, 0.0),  # 0.45 of a side, which is 2 long
    "translate_y": lambda t: (1.0, 0.0, 0.0, 0.0, 1.0, 0.9 * t),
}
OPERATIONS = (*_TABLES, *_COLOURS, *_MOVES)
DRAWS = 4  # of an operation: which, whether, level, sign


def draw_operations(u: Tensor, magnitude: float, spread: float, probability: float) -> Operations:
    """Choose operations from uniforms (B, N · `DRAWS`): levels are normal about magnitude / 10, within [0, 1]."""
    which, whether, level, sign = u.unflatten(1, (-1, DRAWS)).unbind(2)
    number = (which * len(OPERATIONS)).long()
    number = torch.where(whether < probability, number, len(OPERATIONS))
    level = ((magnitude + spread * normal(level)) / 10).clamp(0, 1)
    return Operations(number, level, torch.where(sign < 0.5, -1.0, 1.0))


def randaugment(x: Tensor, of: Operations) -> Tensor:
    """Apply each image's operations one after the other: (B, 3, S, S) in [0, 255] → the same."""
    saturation, sharpness, rotate = (OPERATIONS.index(name) for name in ("saturation", "sharpness", "rotate"))
    for number, level, sign in zip(*(each.unbind(1) for each in of), strict=True):
        x = change(_look_up, x, number < len(_TABLES), number, level, sign)
        x = change(_saturate, x, number == saturation, _factor(level, sign))
        x = change(_sharpen, x, number == sharpness, _factor(level, sign))
        x = change(_move, x, (number >= rotate) & (number < len(OPERATIONS)), number - rotate, level * sign)
    return x


def _look_up(x: Tensor, number: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Apply the operations that are tables, by number."""
    luma = x.mean((2, 3)) @ _on(x.device, LUMA)
    index = x.round().flatten(2).long()
    values = torch.arange(256.0, device=x.device).expand(len(x), 3, -1)
    each = _Of(values, _counts(index), *(t.view(-1, 1, 1) for t in (luma.round(), level, sign)))
    tables = torch.stack([table(each) for table in _TABLES.values()], 1)
    row = number.clamp(max=len(_TABLES) - 1).view(-1, 1, 1, 1).expand(-1, 1, 3, 256)
    return tables.gather(1, row)[:, 0].clamp(0, 255).gather(2, index).view_as(x)


def _counts(index: Tensor) -> Tensor:
    """Pixels of each value in each channel, (B, 3, 256), of (B, 3, pixels)."""
    channels = torch.arange(index.shape[0] * 3, device=index.device).view(-1, 3, 1) * 256
    flat = (index + channels).flatten()
    counts = torch.zeros(index.shape[0] * 768, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(-1, 3, 256)


def _saturate(x: Tensor, factor: Tensor) -> Tensor:
    grey = torch.einsum("bchw,c->bhw", x, _on(x.device, LUMA))[:, None]
    return torch.lerp(grey.expand_as(x), x, factor.view(-1, 1, 1, 1)).clamp(0, 255)


def _sharpen(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with, or away from, a 3×3 smoothing whose border is left as it is."""
    kernel = _on(x.device, (1, 1, 1, 1, 5, 1, 1, 1, 1)).view(1, 1, 3, 3).expand(3, 1, 3, 3) / 13
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(x, kernel, groups=3)
    return torch.lerp(smooth, x, factor.view(-1, 1, 1, 1)).clamp(0, 255)


def _move(x: Tensor, number: Tensor, level: Tensor) -> Tensor:
    """Apply the geometric operations, by number among them."""
    rows = [torch.stack([value + 0 * level for value in move(level)], 1) for move in _MOVES.values()]
    row = number.clamp(0, len(_MOVES) - 1)
    theta = torch.stack(rows, 1).gather(1, row.view(-1, 1, 1).expand(-1, 1, 6)).view(-1, 2, 3)
    fill = _on(x.device, _FILL).view(3, 1, 1)
    return resample(x - fill, theta, x.shape[-1], "zeros") + fill


@cache
def _on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    """Numbers on a device, sent once: sending them waits for the device."""
    return torch.tensor(values, dtype=torch.float32).to(device)
