"""I-JEPA (Assran et al. 2023, arXiv 2301.08243): predict the representations of hidden blocks from one context.

Shape legend: B samples, V views, L levels of the representation (one here), M targets of T patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.collectives import local
from service.config import IJepa, Jepa, Momentum, ViewLoss
from service.families.base import Batch, Embedded, Family, Losses
from service.families.image_vicreg import LOSSES as VIEW_LOSSES
from service.losses import prediction_losses
from service.masks import Masks
from service.models.blocks import patch_coordinates, take
from service.models.encoder import build_encoder
from service.precision import at_least_fp32


class IJepaFamily(Family):
    """Context encoder, its moving average as target encoder, and a narrow predictor between them.

    Without a momentum there is one encoder, and gradients flow through the targets too.
    """

    def __init__(self, config: Jepa, image_size: int) -> None:
        super().__init__()
        from service.models.vit import Predictor  # timm costs seconds to import

        self.config = config
        self.batch_statistics = config.regulariser is not None
        self.pooled_targets = isinstance(config, IJepa) and config.target == "pooled"
        self.stages = config.maskings(image_size)
        self.context_encoder: Any = build_encoder(image_size=image_size, **config.encoder_options())
        self.target_encoder: Any = None
        if config.momentum is not None:
            self.target_encoder = deepcopy(self.context_encoder).requires_grad_(False).eval()
        self.predictor = Predictor(
            self.context_encoder.num_features,
            coordinates=self._coordinates(),
            rope=config.encoder.positions == "rope",
            attention=config.encoder.attention,
            checkpointing=config.encoder.checkpointing,
            **config.predictor.model_dump(),
        )

    @property
    def encoder(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoder that `eval_encoder` names, or the only one."""
        return self.context_encoder if self._context_evaluated else self.target_encoder

    @property
    def others(self) -> dict[str, nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoder that `eval_encoder` does not name."""
        if self.target_encoder is None:
            return {}
        if self._context_evaluated:
            return {"target_encoder": self.target_encoder}
        return {"context_encoder": self.context_encoder}

    @property
    def _context_evaluated(self) -> bool:
        return self.target_encoder is None or self.config.eval_encoder == "context"

    def draw_masks(self, seed: int, step: int, start: int, stop: int, progress: float) -> Masks:
        """Masks of positions `start` … `stop − 1` of the global batch of a step, of the curriculum's stage."""
        return self.stages[stage_at(len(self.stages), progress)].draw(seed, step, start, stop)

    def embed(self, batch: Batch) -> Embedded:
        """Encode (V, B, 3, S, S).

        Returns:
            `prediction` distances (B, L); `pooled` tokens of the targets' encoder (B, V, L, D); with a regulariser its
            `views` (B, 2, L, D), and `local` (B, C, L, D) of C local crops.
        """
        views = len(batch.views)
        images, keys = batch.views.flatten(0, 1), _of_views(batch.keys, views)
        assert batch.context is not None and batch.targets is not None
        context, targets = batch.context.repeat(views, 1), self._places(batch.targets.repeat(views, 1, 1))
        seen, means = self._context(images, keys, context)
        predicted = self.predictor(seen, self._places(context)[0], targets)
        wanted = self._targets(images, keys)
        distances = [self._distance(*each) for each in zip(predicted, wanted, targets, strict=True)]
        pooled = _by_sample(torch.stack([tokens.mean(1) for tokens in wanted], 1), views)
        rows = {"prediction": _by_sample(torch.stack(distances, 1), views).mean(1), "pooled": pooled.detach()}
        if self.config.regulariser is not None:
            contexts = _by_sample(means, views)
            rows["views"] = contexts if views > 1 else torch.cat([contexts, pooled.to(contexts.dtype)], 1)
        if batch.local is not None:
            crops = len(batch.local)
            keys = _of_views(batch.keys, views + crops, first=views)
            rows["local"] = _by_sample(self._means(batch.local.flatten(0, 1), keys), crops)
        return rows

    def losses(self, embedded: Embedded, batch: Batch) -> Losses:
        """Weigh the levels' mean distances, and the regulariser."""
        pooled, per_level = embedded["pooled"].detach(), embedded["prediction"].mean(0)
        total = torch.stack([w * loss for w, loss in zip(self._weights(), per_level.unbind(), strict=True)]).sum()
        terms, features = {"prediction": total.detach()}, {}
        for name, level, loss in zip(self._names(), pooled.unbind(2), per_level.detach(), strict=True):
            suffix = "" if name == "encoder" else f"_{name}"
            terms |= {f"prediction{suffix}": loss, f"feature_std{suffix}": level.flatten(0, 1).std(0).mean()}
            features[name] = level.transpose(0, 1)
        if self.config.regulariser is not None:
            penalty, parts = self._regularise(self.config.regulariser, embedded, batch.keys)
            total = total + self.config.regulariser_weight * penalty
            terms |= {name: part.detach() for name, part in parts.items()}
        return Losses(total, terms, features)

    def _regularise(self, loss: ViewLoss, embedded: Embedded, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of pooled views, mean over levels, and the means of its terms."""
        local = embedded.get("local", embedded["views"][:, :0])
        found = [
            VIEW_LOSSES[loss.kind](loss, [*views.unbind(1)], [*crops.unbind(1)], keys)
            for views, crops in zip(embedded["views"].unbind(2), local.unbind(2), strict=True)
        ]
        terms = {name: torch.stack([terms[name] for _, terms in found]).mean() for name in found[0][1]}
        return torch.stack([total for total, _ in found]).mean(), terms

    def train(self, mode: bool = True) -> IJepaFamily:
        """Switch all but the target encoder, which never drops paths."""
        super().train(mode)
        if self.target_encoder is not None:
            self.target_encoder.eval()
        return self

    def after_step(self, progress: float) -> None:
        """Let the target encoder follow: w̄ ← τ·w̄ + (1 − τ)·w."""
        if self.config.momentum is not None:
            follow(self.target_encoder, self.context_encoder, momentum(self.config.momentum, progress))

    def scheduled(self, progress: float) -> dict[str, float]:
        """The target encoder's momentum, if there is one."""
        return {} if self.config.momentum is None else {"momentum": momentum(self.config.momentum, progress)}

    def _targets(self, images: Tensor, keys: Tensor) -> list[Tensor]:
        """All tokens of each level that targets are taken of, (V·B, N_l, D) in at least fp32."""
        if self.target_encoder is None:
            return self._levels(self.context_encoder, images, ~keys)
        with torch.no_grad():
            return [at_least_fp32(tokens) for tokens in self._levels(self.target_encoder, images)]

    def _distance(self, predicted: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Distance of (V·B, M, T, D) to the tokens at the targets' places, or of the mean to theirs, (V·B,)."""
        wanted = take(normalised(tokens, self.config.normalise_targets), targets).to(predicted.dtype)
        if self.pooled_targets:
            predicted, wanted = predicted.mean(2), wanted.mean(2)
        return prediction_losses(predicted, wanted, self.config.loss)

    def _names(self) -> Sequence[str]:
        return ("encoder",)

    def _weights(self) -> Sequence[float]:
        return (1.0,)

    def _coordinates(self) -> list[Tensor]:
        """Places that the predictor can be asked for on each level, (N_l, 2)."""
        return [patch_coordinates(self.context_encoder.trained_grid)]

    def _context(self, images: Tensor, keys: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the context that the predictor is given, (V·B, K, D), and each level's mean, (V·B, L, D)."""
        tokens = self.context_encoder.tokens(images, keep, keys)
        return tokens, tokens.mean(1, keepdim=True)

    def _levels(self, encoder: Any, images: Tensor, keys: Tensor | None = None) -> list[Tensor]:
        """All tokens of each level, (V·B, N_l, D)."""
        return [encoder.tokens(images, None, keys)]

    def _means(self, images: Tensor, keys: Tensor) -> Tensor:
        """Mean of each level of images of any size, (B, L, D), in the context encoder."""
        return self.context_encoder.tokens(images, None, keys).mean(1, keepdim=True)

    def _places(self, patches: Tensor) -> list[Tensor]:
        """Places of masks' patches (…, T) on each level, (…, T_l)."""
        return [patches]


def _of_views(keys: Tensor, views: int, first: int = 0) -> Tensor:
    """Keys of views `first` … `views − 1` of the samples, one view after the other."""
    return torch.cat([keys ^ view for view in range(first, views)])


def _by_sample(rows: Tensor, views: int) -> Tensor:
    """(V·B, …), one view after the other → (B, V, …)."""
    return rows.unflatten(0, (views, -1)).transpose(0, 1)


def normalised(tokens: Tensor, how: str) -> Tensor:
    """Target tokens (…, D), layer-normalised without affine, of length 1, or as they are."""
    if how == "layer":
        return F.layer_norm(tokens, tokens.shape[-1:])
    return F.normalize(tokens, dim=-1) if how == "l2" else tokens


def momentum(config: Momentum, progress: float) -> float:
    """τ after `progress` in [0, 1] of the run."""
    share = min(1.0, progress / config.warmup)
    if config.schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return config.start + (config.end - config.start) * share


def stage_at(stages: int, progress: float) -> int:
    """Stage of equally long ones, `progress` in [0, 1] through the run."""
    return min(int(progress * stages), stages - 1)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, tau: float) -> None:
    """Move `average` towards `module` by 1 − τ, parameters and floating buffers alike, with multi-tensor kernels."""
    mine, theirs = _floats(average), _floats(module)
    torch._foreach_lerp_(mine, theirs, 1 - tau)


def _floats(module: nn.Module) -> list[Tensor]:
    return [t.detach() for t in local((*module.parameters(), *module.buffers())) if t.is_floating_point()]
