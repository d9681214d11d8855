"""What the training loop knows of a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from service.collectives import all_reduce_sum
from service.masks import Masks


@dataclass(frozen=True)
class Losses:
    """Result of a family's forward pass.

    `total` is what is minimised, a scalar whose mean over ranks is the global loss; `terms` are unweighted parts and
    statistics to report, scalars without gradient; `features` are detached representations by name, each
    (V, B, D) of V views of this rank's samples, for monitoring.
    """

    total: Tensor
    terms: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)


class Batch(NamedTuple):
    """This rank's slice of the global batch, or a micro-batch of it.

    `views` (V, B, 3, S, S) are normalised; `keys` (B,) int64 are random numbers of each sample at this step; `context`
    (B, K) and `targets` (B, M, T) are the patches of the family's masks, none where it draws none; `local`
    (L, B, 3, s, s) are the normalised local crops, where the config has any.
    """

    views: Tensor
    keys: Tensor
    context: Tensor | None = None
    targets: Tensor | None = None
    local: Tensor | None = None

    def split(self, parts: int) -> list[Batch]:
        """Cut the samples into `parts` equal batches, in order; what has no samples goes to each."""
        cut = (
            [tensor] * parts if tensor is None or not tensor.ndim else tensor.chunk(parts, int(name in _VIEWS))
            for name, tensor in self._asdict().items()
        )
        return [Batch(*fields) for fields in zip(*cut, strict=True)]


_VIEWS = ("views", "local")  # fields whose second dimension is the samples; of all others it is the first
Embedded = dict[str, Tensor]


def step_seed(keys_B: Tensor) -> Tensor:
    """Random number of the step that these keys of all its samples belong to, equal on every rank, () int64."""
    return all_reduce_sum(keys_B.sum())


class Family(nn.Module):
    """One method: module and loss together, so that DDP or FSDP wraps one thing.

    `forward` is `losses` after `embed`. A loss that is a mean over samples is accumulated by adding up micro-batches.
    One with `batch_statistics` is not: then all micro-batches are embedded without gradients, `losses` of all of them
    gives ∂total/∂z, and each micro-batch is embedded again to carry its rows of that back into the weights, so that
    the gradient is the undivided batch's (Gao et al. 2021, arXiv 2101.06983). Hence `losses` has no parameters.
    """

    encoder: nn.Module  # what is evaluated, exported and served: (B, 3, H, W) → (B, dim)
    views: int  # global augmented views that `embed` takes of each image: its config's `views`
    others: Mapping[str, nn.Module] = {}  # encoders trained beside it, which the final report names
    local_views: int = 0  # local crops that it takes beside them: `data.local.count`
    batch_statistics: bool  # the loss depends on the batch as a whole

    def embed(self, batch: Batch) -> Embedded:
        """Compute all that the losses need, sample by sample: named tensors (B, …), B samples in every one."""
        raise NotImplementedError

    def losses(self, embedded: Embedded, batch: Batch) -> Losses:
        """Compute the losses of this rank's slice of the global batch, or of a micro-batch without batch statistics."""
        raise NotImplementedError

    def forward(self, batch: Batch, slopes: Embedded | None = None, *, only_embed: bool = False) -> Losses | Embedded:
        """Compute the losses of a batch; or, given `slopes` ∂total/∂z (B, …) by name, Σ z·∂total/∂z as `total`.

        With `only_embed`, give what is embedded: what wraps a family for FSDP acts on `forward` alone.
        """
        embedded = self.embed(batch)
        if only_embed:
            return embedded
        if slopes is None:
            return self.losses(embedded, batch)
        carried = [(embedded[name] * slope).sum() for name, slope in slopes.items() if embedded[name].requires_grad]
        return Losses(torch.stack(carried).sum(), {})

    def draw_masks(self, seed: int, step: int, start: int, stop: int, progress: float) -> Masks | None:
        """Masks of positions `start` … `stop − 1` of the global batch of a step, `progress` through the run."""
        return None

    def after_step(self, progress: float) -> None:
        """Update what gradients do not, `progress` in (0, 1] through the run; after a taken optimiser step only."""

    def scheduled(self, progress: float) -> dict[str, float]:
        """What the family changes over the run, by name, `progress` in (0, 1] through it; reported with the losses."""
        return {}
