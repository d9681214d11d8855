"""SIGReg: how far random one-dimensional projections of embeddings are from a standard normal (Epps and Pulley 1983).

The statistic compares the empirical characteristic function E e^{itz} with e^{−t²/2} at some knots t. Cosines of a
regular grid follow from two of them by c_{k+1} = 2·cos(h·z)·c_k − c_{k−1}, sines alike, and t < 0 adds nothing new,
so a knot costs two multiplications instead of a complex exponential.

Shape legend: B samples of this rank, G of all ranks, D dimensions, S slices, K knots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from service.collectives import all_reduce_sum, world_size
from service.data.draws import hash_torch, key
from service.precision import at_least_fp32

Variant = Literal["bcs", "lejepa"]
_CHUNK = 1 << 15  # projections that a thread works on at once: they stay in its core's cache


@dataclass(frozen=True)
class Knots:
    """A regular grid of t with the weights of its quadrature over all t; the first knot is 0 or half a step."""

    first: float
    step: float
    weights: tuple[float, ...]

    @property
    def values(self) -> list[float]:
        """The knots, K."""
        return [self.first + self.step * k for k in range(len(self.weights))]

    @property
    def signs(self) -> list[int]:
        """+, −, −, +, +, …: those that each knot's waves are computed with, K."""
        return [1 if (k + 1) % 4 < 2 else -1 for k in range(len(self.weights))]


# eb_jepa: 10 knots from −3 to 3. LeJEPA (Balestriero and LeCun 2025): 17 from 0 to 3, mirrored. Both trapezoid.
KNOTS: dict[Variant, Knots] = {
    "bcs": Knots(1 / 3, 2 / 3, (4 / 3, 4 / 3, 4 / 3, 4 / 3, 2 / 3)),
    "lejepa": Knots(0.0, 3 / 16, (3 / 16, *[3 / 8] * 15, 3 / 16)),
}


def sigreg(z: Tensor, seed: Tensor | int, *, slices: int, variant: Variant) -> Tensor:
    """Distance of the embeddings of the global batch from an isotropic standard normal, a scalar in at least fp32.

    Args:
        z: embeddings, (B, D) or (V, B, D) of V views, whose distances are averaged; neither centred nor scaled:
            standardising them would hide a collapse.
        seed: of the slices' directions, equal on all ranks; drawn anew every step.
        slices: number of directions S.
        variant: `bcs` (eb_jepa) is the mean over slices, `lejepa` that times the number of samples G.
    """
    z = at_least_fp32(z)
    with torch.autocast(z.device.type, enabled=False):
        projected = z @ directions(seed, z.shape[-1], slices, z)
        statistic = epps_pulley(projected.movedim(-2, 0).flatten(1), KNOTS[variant]).mean()
    return statistic * (z.shape[-2] * world_size()) if variant == "lejepa" else statistic


def epps_pulley(x_BS: Tensor, knots: Knots) -> Tensor:
    """∫ |E e^{itx} − e^{−t²/2}|² e^{−t²/2} dt of each column over the global batch, (S,)."""
    sums = _WaveSums.apply(x_BS, knots)
    cos_KS, sin_KS = all_reduce_sum(sums / (len(x_BS) * world_size())).unbind(0)  # pyright: ignore
    t = torch.tensor(knots.values, dtype=x_BS.dtype, device=x_BS.device)
    normal = torch.exp(-t.square() / 2)[:, None]
    weights = torch.tensor(knots.weights, dtype=x_BS.dtype, device=x_BS.device)[:, None] * normal
    return (weights * ((cos_KS - normal).square() + sin_KS.square())).sum(0)


def directions(seed: Tensor | int, dim: int, slices: int, like: Tensor) -> Tensor:
    """Random unit vectors, (D, S), uniform on the sphere: a function of the seed, equal on every device and rank."""
    pairs = -(-dim * slices // 2)
    bits = hash_torch(0, hash_torch(key(1), torch.arange(2 * pairs, device=like.device)) ^ seed)
    u = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53).view(2, pairs)
    radius, angle = torch.sqrt(-2 * torch.log(u[0])), 2 * math.pi * u[1]  # Box and Muller 1958
    normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)]).flatten()[: dim * slices]
    normal = normal.view(dim, slices)
    return (normal / normal.norm(dim=0)).to(like.dtype)


class _WaveSums(Function):
    """Sums over samples of cos(t·x) and sin(t·x) at each knot, (2, K, S), with the recurrence both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, knots: Knots) -> Tensor:
        ctx.save_for_backward(x)
        ctx.knots = knots
        sums = x.new_empty(2, len(knots.weights), x.shape[1])
        for columns in _columns(x):
            for k, waves in enumerate(_waves(x[:, columns].T.contiguous(), knots)):
                for part, wave in zip(sums, waves, strict=True):
                    torch.sum(wave, 1, out=part[k, columns])
        return sums.mul_(torch.tensor(knots.signs, dtype=x.dtype, device=x.device)[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        t, signs = torch.tensor([ctx.knots.values, ctx.knots.signs], dtype=x.dtype, device=x.device)
        slopes = (t * signs)[:, None] * grads[0]
        of_cos, of_sin = slopes[1, :, :, None], -slopes[0, :, :, None]  # what each wave contributes to the derivative
        gradient = torch.empty_like(x)
        for columns in _columns(x):
            lying = x[:, columns].T.contiguous()
            part = torch.zeros_like(lying)
            for k, (cos, sin) in enumerate(_waves(lying, ctx.knots)):
                part.addcmul_(cos, of_cos[k, columns]).addcmul_(sin, of_sin[k, columns])
            gradient[:, columns] = part.T
        return gradient, None


def _columns(x: Tensor) -> list[slice]:
    width = max(1, _CHUNK * torch.get_num_threads() // len(x)) if x.device.type == "cpu" else x.shape[1]
    return [slice(start, start + width) for start in range(0, x.shape[1], width)]


def _waves(x: Tensor, knots: Knots) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cos(t·x) and sin(t·x) for each knot, both times its sign; each pair is overwritten two knots later.

    With those signs the recurrence is an addition in place: u_{k+1} = u_{k−1} ± 2·cos(h·x)·u_k.
    """
    base = knots.first or knots.step  # the knot before the first is −base
    cos, sin = torch.cos(base * x), torch.sin(base * x)
    if knots.first:
        turn, newer = cos.square().mul_(4).sub_(2), (cos.clone(), sin)
    else:
        turn, newer = 2 * cos, (torch.ones_like(x), torch.zeros_like(x))
    older = cos, -sin
    for sign, following in pairwise([*knots.signs, 0]):
        yield newer
        if following:
            for old, new in zip(older, newer, strict=True):
                old.addcmul_(turn, new, value=sign * following)
        older, newer = newer, older
