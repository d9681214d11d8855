"""Gradients of a batch that is larger than memory: micro-batches whose gradients add up to the undivided batch's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from service.engine.parallel import exchanging
from service.families.base import Batch, Embedded, Family, Losses

Autocast = Callable[[], AbstractContextManager[Any]]
Scale = Callable[[Tensor], Tensor]


def parts_of(samples: int, most: int | None) -> int:
    """Least number of equal micro-batches, of `most` samples or fewer; one where nothing bounds them."""
    return next(n for n in range(1, samples + 1) if samples % n == 0 and samples // n <= (most or samples))


def backward(
    module: nn.Module, family: Family, batch: Batch, *, parts: int, autocast: Autocast, scale: Scale
) -> Losses:
    """Add the gradients of this rank's slice of the global batch to the parameters'.

    Args:
        module: `family`, or what wraps it.
        family: see `Family` for which of them take two passes.
        batch: this rank's slice.
        parts: micro-batches to cut it into.
        autocast: makes the context of a forward pass.
        scale: multiplies a loss before its backward pass, as fp16 wants.

    Returns:
        The losses of the slice; without batch statistics, `terms` are means over micro-batches.
    """
    if parts == 1:
        with autocast():
            losses = module(batch)
        scale(losses.total).backward()
        return losses
    pieces = batch.split(parts)
    if family.batch_statistics:
        return _two_passes(module, family, batch, pieces, autocast, scale)
    return _mean([_add(module, piece, autocast, scale, piece is pieces[-1], parts) for piece in pieces])


def _add(
    module: nn.Module, piece: Batch, autocast: Autocast, scale: Scale, last: bool, parts: int = 1, **options: Any
) -> Losses:
    """One micro-batch, forward and backward; ranks exchange gradients at the last one."""
    with exchanging(module, last):
        with autocast():
            losses = module(piece, **options)
        scale(losses.total / parts).backward()
    return Losses(losses.total.detach(), losses.terms, losses.features)


def _two_passes(
    module: nn.Module, family: Family, batch: Batch, pieces: list[Batch], autocast: Autocast, scale: Scale
) -> Losses:
    """Embed without gradients, find ∂total/∂z of the whole slice, embed again to carry it into the weights."""
    embedded = _embed(module, pieces, autocast)
    with autocast():
        losses = family.losses(embedded, batch)
    found = torch.autograd.grad(scale(losses.total), list(embedded.values()), allow_unused=True)
    slopes = {name: slope for name, slope in zip(embedded, found, strict=True) if slope is not None}
    for i, piece in enumerate(pieces):
        rows = {name: slope.chunk(len(pieces))[i] for name, slope in slopes.items()}
        _add(module, piece, autocast, lambda total: total, piece is pieces[-1], slopes=rows)
    return Losses(losses.total.detach(), losses.terms, losses.features)


@torch.no_grad()
def _embed(module: nn.Module, pieces: list[Batch], autocast: Autocast) -> Embedded:
    """Embeddings of all micro-batches, leaves that gradients are taken of."""
    embedded = []
    for piece in pieces:  # a context each: autocast's casts of the weights do not outlive it without their gradients
        with autocast():
            embedded.append(module(piece, only_embed=True))
    return {name: torch.cat([e[name] for e in embedded]).requires_grad_() for name in embedded[0]}


def _mean(found: list[Losses]) -> Losses:
    """Means of the micro-batches' losses and terms; their features one after the other."""
    first = found[0]
    return Losses(
        torch.stack([losses.total for losses in found]).mean(),
        {name: torch.stack([losses.terms[name] for losses in found]).mean() for name in first.terms},
        {name: torch.cat([losses.features[name] for losses in found], 1) for name in first.features},
    )
