"""What the training loop knows of a family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Losses:
    """Result of a family's forward pass.

    `total` is what is minimised, a scalar whose mean over ranks is the global loss; `terms` are unweighted parts and
    statistics to report, scalars without gradient.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Family(nn.Module):
    """One method: module and loss together, so that DDP or FSDP wraps one thing."""

    encoder: nn.Module  # what is evaluated, exported and served: (B, 3, H, W) → (B, dim)
    views: int  # augmented views that `forward` takes of each image

    def forward(self, views_VBCHW: Tensor) -> Losses:
        """Compute the losses of this rank's slice of the global batch, views (V, B, 3, S, S)."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Update what gradients do not (momentum encoders, schedules); called after a taken optimiser step only."""
