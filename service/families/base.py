"""What the training loop knows of a family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

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
    """This rank's slice of the global batch.

    `views` (V, B, 3, S, S) are normalised; `keys` (B,) int64 are random numbers of each sample at this step; `context`
    (B, K) and `targets` (B, M, T) are the patches of the family's masks, none where it draws none.
    """

    views: Tensor
    keys: Tensor
    context: Tensor | None = None
    targets: Tensor | None = None


class Family(nn.Module):
    """One method: module and loss together, so that DDP or FSDP wraps one thing."""

    encoder: nn.Module  # what is evaluated, exported and served: (B, 3, H, W) → (B, dim)
    views: int  # augmented views that `forward` takes of each image

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses of this rank's slice of the global batch."""
        raise NotImplementedError

    def draw_masks(self, seed: int, step: int, start: int, stop: int, progress: float) -> Masks | None:
        """Masks of positions `start` … `stop − 1` of the global batch of a step, `progress` through the run."""
        return None

    def after_step(self, progress: float) -> None:
        """Update what gradients do not, `progress` in (0, 1] through the run; after a taken optimiser step only."""
