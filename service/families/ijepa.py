"""I-JEPA (Assran et al. 2023, arXiv 2301.08243): predict the representations of hidden blocks from one context."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.config import IJepa, Momentum
from service.families.base import Batch, Embedded, Family, Losses
from service.losses import prediction_loss
from service.masks import Masks
from service.models.blocks import take
from service.models.encoder import build_encoder


class IJepaFamily(Family):
    """Context encoder, its moving average as target encoder, and a narrow predictor between them."""

    batch_statistics = False

    def __init__(self, config: IJepa, image_size: int) -> None:
        super().__init__()
        from service.models.vit import Predictor  # timm costs seconds to import

        self.config = config
        self.masking = config.masking.build((image_size // config.encoder.patch_size,) * 2)
        self.context_encoder = build_encoder(image_size=image_size, **config.encoder.model_dump())
        self.target_encoder = deepcopy(self.context_encoder).requires_grad_(False).eval()
        encoder, options = config.encoder, config.predictor.model_dump()
        self.predictor = Predictor(
            self.context_encoder.dim,  # pyright: ignore[reportArgumentType]
            grid=(image_size // encoder.patch_size,) * 2,
            rope=encoder.positions == "rope",
            attention=encoder.attention,
            checkpointing=encoder.checkpointing,
            **options,
        )

    @property
    def encoder(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoder that `eval_encoder` names."""
        return self.target_encoder if self.config.eval_encoder == "target" else self.context_encoder

    def draw_masks(self, seed: int, step: int, start: int, stop: int, progress: float) -> Masks:
        """Masks of positions `start` … `stop − 1` of the global batch of a step."""
        return self.masking.draw(seed, step, start, stop)

    def embed(self, batch: Batch) -> Embedded:
        """Encode (1, B, 3, S, S): `predicted` and `wanted` tokens (B, M, T, D), `pooled` ones of the target (B, D)."""
        images, context, targets = batch.views[0], batch.context, batch.targets
        assert context is not None and targets is not None
        predicted = self.predictor(self.context_encoder.tokens(images, context, batch.keys), context, targets)
        with torch.no_grad():
            seen = self.target_encoder.tokens(images)
            seen = seen if seen.dtype == torch.float64 else seen.float()
            wanted = take(F.layer_norm(seen, seen.shape[-1:]) if self.config.normalise_targets else seen, targets)
        return {"predicted": predicted, "wanted": wanted.to(predicted.dtype), "pooled": seen.mean(1)}

    def losses(self, embedded: Embedded, batch: Batch) -> Losses:
        """Take the mean over targets of the distance to the target encoder's tokens."""
        wanted, pooled = embedded["wanted"], embedded["pooled"]
        loss = prediction_loss(embedded["predicted"], wanted, self.config.loss)
        spread = {"feature_std": pooled.std(0).mean(), "target_std": wanted.flatten(0, 2).std(0).mean()}
        return Losses(loss, {"prediction": loss.detach(), **spread}, {"encoder": pooled[None]})

    def train(self, mode: bool = True) -> IJepaFamily:
        """Switch all but the target encoder, which never drops paths."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def after_step(self, progress: float) -> None:
        """Let the target encoder follow: w̄ ← τ·w̄ + (1 − τ)·w."""
        follow(self.target_encoder, self.context_encoder, momentum(self.config.momentum, progress))

    def scheduled(self, progress: float) -> dict[str, float]:
        """The target encoder's momentum."""
        return {"momentum": momentum(self.config.momentum, progress)}


def momentum(config: Momentum, progress: float) -> float:
    """τ after `progress` in [0, 1] of the run."""
    share = progress if config.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return config.start + (config.end - config.start) * share


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, tau: float) -> None:
    """Move `average` towards `module` by 1 − τ, parameters and floating buffers alike, with multi-tensor kernels."""
    mine, theirs = _floats(average), _floats(module)
    torch._foreach_lerp_(mine, theirs, 1 - tau)


def _floats(module: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
