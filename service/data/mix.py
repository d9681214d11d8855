"""Mix-up (Zhang et al. 2018) and CutMix (Yun et al. 2019) of the views of a batch.

A sample's partner, share and rectangle are functions of (seed, step, position in the global batch), and the partner is
a sample of the same canonical partition. All views of a sample are mixed alike, so they stay views of one thing.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from service.data.draws import key, uniform
from service.data.pixels import inside

_PARTNERS, _SHARES = 0, 1  # streams of draws
_KNOTS = 4096  # of the tables that beta variables are drawn by


class Mixes(NamedTuple):
    """How the samples of a rank's slice are mixed, (B,) or (B, 4)."""

    partner: Tensor  # int64, place in the slice
    share: Tensor  # λ, of the sample itself
    cut: Tensor  # whether a rectangle is the partner's, and not a share of every pixel
    box: Tensor  # the rectangle: top, left, height, width, relative to the side


def draw_mixes(
    seed: int, step: int, positions: range, per_partition: int, *, mixup: float, cutmix: float, device: torch.device
) -> Mixes:
    """Draw how samples are mixed at a step.

    Args:
        seed: of the run.
        step: of the run.
        positions: in the global batch, whole partitions.
        per_partition: samples of a partition in a step, n ≥ 2; the k-th takes the (k + s mod n)-th for partner, s drawn
            for the partition.
        mixup: α of λ ~ Beta(α, α); 0 leaves mix-up out.
        cutmix: α of CutMix; where both are given, each sample takes either with equal probability.
        device: of the result.
    """
    assert per_partition >= 2 and not positions.start % per_partition and not len(positions) % per_partition
    place = torch.arange(positions.start, positions.stop, device=device)
    partition, within = place // per_partition, place % per_partition
    shift = 1 + (uniform(key(seed, step, _PARTNERS), partition, 1)[:, 0] * (per_partition - 1)).long()
    partner = partition * per_partition + (within + shift) % per_partition - positions.start
    which, u, y, x = uniform(key(seed, step, _SHARES), place, 4).unbind(1)
    cut = which < (0.5 if mixup and cutmix else float(cutmix > 0))
    share = torch.where(cut, _beta(u, cutmix or mixup), _beta(u, mixup or cutmix))
    half = (1 - share).sqrt() / 2
    top, left, bottom, right = (edge.clamp(0, 1) for edge in (y - half, x - half, y + half, x + half))
    return Mixes(partner, share, cut, torch.stack([top, left, bottom - top, right - left], 1))


def mix(views: Tensor, mixes: Mixes) -> Tensor:
    """Mix each sample of (V, B, 3, S, S) with its partner."""
    size = views.shape[-1]
    own = torch.where(mixes.cut.view(-1, 1, 1, 1), ~inside(mixes.box * size, size), mixes.share.view(-1, 1, 1, 1))
    return torch.lerp(views[:, mixes.partner], views, own.to(views.dtype))


def _beta(u: Tensor, alpha: float) -> Tensor:
    """Beta(α, α) variables by the inverse of their distribution function, from uniforms (B,)."""
    table = _quantiles(alpha, u.device)
    place = u * _KNOTS
    below = place.long()
    return torch.lerp(table[below], table[below + 1], place - below)


@cache
def _quantiles(alpha: float, device: torch.device) -> Tensor:
    from scipy.special import betaincinv  # costs time to import, and few runs mix

    u = torch.linspace(0, 1, _KNOTS + 1, dtype=torch.float64)
    return torch.from_numpy(betaincinv(alpha, alpha, u.numpy())).float().to(device)
