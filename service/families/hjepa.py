"""H-JEPA: I-JEPA on the levels of a pyramid, after LeCun 2022 (A path towards autonomous machine intelligence, §4.6).

A level is the token grid, pooled 2ˡ×2ˡ, at some depth of the encoder: finer levels hold details, coarser ones what
larger regions have in common. Masks consist of whole cells of the coarsest grid, so that on no level a cell mixes
context and target. One predictor sees the context's patches and is asked for a target's cells of all levels at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from service.config import HJepa
from service.families.ijepa import IJepaFamily


class HJepaFamily(IJepaFamily):
    """I-JEPA whose encoders are `PyramidTransformer`s: total = Σ wᵢ · distanceᵢ + λ · regulariser."""

    config: HJepa

    def _names(self) -> Sequence[str]:
        return [f"level{level + 1}" for level in range(self.config.levels)]

    def _weights(self) -> Sequence[float]:
        return self.config.weights or [0.5**level for level in range(self.config.levels)]

    def _coordinates(self) -> list[Tensor]:
        return self.context_encoder.coordinates()

    def _context(self, images: Tensor, keys: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return self.context_encoder.context(images, keep, keys)

    def _levels(self, encoder: Any, images: Tensor, keys: Tensor | None = None) -> list[Tensor]:
        return encoder.pyramid(images, keys)

    def _means(self, images: Tensor, keys: Tensor) -> Tensor:
        return self.context_encoder.every_level(images, keys)

    def _places(self, patches: Tensor) -> list[Tensor]:
        return self.context_encoder.places(patches)
