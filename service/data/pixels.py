"""Operations on chosen images of a batch that augmentations share: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in PIL and torchvision


def change(how: Callable[..., Tensor], x: Tensor, chosen: Tensor, *parameters: Tensor) -> Tensor:
    """Change the chosen images: a CPU leaves the others out, a GPU cannot without waiting to learn which they are."""
    if x.device.type != "cpu":
        return torch.where(chosen.view(-1, 1, 1, 1), how(x, *parameters), x)
    rows = chosen.nonzero()[:, 0]
    if len(rows) in (0, len(x)):
        return how(x, *parameters) if len(rows) else x
    return x.index_copy(0, rows, how(x[rows], *(each[rows] for each in parameters)))


def affine(
    top: Tensor,
    left: Tensor,
    h: Tensor,
    w: Tensor,
    sign: Tensor,
    angle: Tensor,
    shear: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Cut, flip, shear and turn images of (height, width) by one matrix each, (B, 2, 3), for `resample`."""
    cos, sin, slant = torch.cos(angle), torch.sin(angle), torch.tan(shear)
    to_x, to_y = w / width, h / height
    return torch.stack(
        [
            torch.stack([sign * cos * to_x, (cos * slant - sin) * to_x, (2 * left + w) / width - 1], -1),
            torch.stack([sign * sin * to_y, (sin * slant + cos) * to_y, (2 * top + h) / height - 1], -1),
        ],
        1,
    )


def resample(x_BCHW: Tensor, theta_B23: Tensor, size: int, outside: Literal["border", "zeros"] = "border") -> Tensor:
    """Sample each image bilinearly to (size, size) where its matrix leads; outside an image its edge is repeated, or 0.

    The result of a plain crop equals cutting it out and calling `interpolate(…, mode="bilinear")` on it.
    """
    centres = (2 * torch.arange(size, device=x_BCHW.device) + 1) / size - 1
    across, down, shift = (theta_B23[:, :, None, :] * torch.ones_like(centres)[:, None]).unbind(-1)
    grid = (across * centres + shift)[:, :, None, :] + (down * centres)[:, :, :, None]
    return F.grid_sample(x_BCHW, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode=outside, align_corners=False)


def inside(box_B4: Tensor, size: int) -> Tensor:
    """Pixels whose centres lie in each rectangle of (top, left, height, width), (B, 1, size, size)."""
    top, left, height, width = (each.view(-1, 1, 1, 1) for each in box_B4.unbind(1))
    centres = torch.arange(size, device=box_B4.device) + 0.5
    rows, columns = centres.view(-1, 1), centres
    return (rows > top) & (rows < top + height) & (columns > left) & (columns < left + width)
