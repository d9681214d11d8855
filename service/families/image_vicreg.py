"""Joint embedding of augmented views: VICReg (Bardes, Ponce and LeCun 2022, arXiv 2105.04906), LeJEPA and others."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from service.config import ImageVicreg, NtXentLoss, SigregLoss, VicregLoss, VicregSigregLoss, ViT
from service.data.draws import hash_torch, key
from service.families.base import Batch, Embedded, Family, Losses, step_seed
from service.losses import invariance, nt_xent, pair_distance, vicreg_terms
from service.models.encoder import build_encoder
from service.models.projector import projector
from service.sigreg import sigreg

Terms = dict[str, Tensor]


class ImageVicregFamily(Family):
    """Encoder, projector, and the loss of its embeddings that the config names."""

    batch_statistics = True

    def __init__(self, config: ImageVicreg, image_size: int) -> None:
        super().__init__()
        self.loss = config.loss
        self.drops_paths = isinstance(config.encoder, ViT)
        self.encoder = build_encoder(image_size=image_size, **config.encoder_options())
        head = config.projector
        self.projector = projector(self.encoder.dim, head.hidden, head.output, head.layers, head.norm)

    def embed(self, batch: Batch) -> Embedded:
        """Embed (V, B, 3, S, S) and (L, B, 3, s, s) to `encoder` and `projector`, (B, V + L, D) each.

        Views of a size pass through the encoder as one batch, all of them through the projector: batch norm sees them
        together.
        """
        views = [self._represent(batch.views, batch.keys, 0)]
        if batch.local is not None:
            views.append(self._represent(batch.local, batch.keys, len(batch.views)))
        represented = torch.cat(views)
        rows = {"encoder": represented.detach(), "projector": self.projector(represented)}
        return {name: z.unflatten(0, (-1, len(batch.keys))).transpose(0, 1) for name, z in rows.items()}

    def losses(self, embedded: Embedded, batch: Batch) -> Losses:
        """Compute the config's loss over the global batch."""
        count = len(batch.views)
        represented, z = (embedded[name].transpose(0, 1) for name in ("encoder", "projector"))
        total, terms = LOSSES[self.loss.kind](self.loss, list(z[:count]), list(z[count:]), batch.keys)
        values = {name: term.detach() for name, term in terms.items()}
        values["feature_std"] = represented[:count].float().flatten(0, 1).std(0).mean()
        return Losses(total, values, {"encoder": represented[:count], "projector": z[:count].detach()})

    def _represent(self, views: Tensor, keys: Tensor, first: int) -> Tensor:
        """Encode views number `first` and on, (V, B, 3, S, S), to (V·B, dim); each drops paths of its own."""
        if not self.drops_paths:
            return self.encoder(views.flatten(0, 1))
        return self.encoder(
            views.flatten(0, 1), torch.cat([hash_torch(key(first + v), keys) for v in range(len(views))])
        )


def _vicreg(loss: VicregLoss, views: list[Tensor], local: list[Tensor], keys: Tensor) -> tuple[Tensor, Terms]:
    """λ_inv · inv + λ_std · std + λ_cov · cov (eq. 6)."""
    terms = vicreg_terms(*views, local=local, gamma=loss.gamma, cov_norm=loss.cov_norm)
    return loss.inv * terms["inv"] + loss.std * terms["std"] + loss.cov * terms["cov"], terms


def _sigreg(loss: SigregLoss, views: list[Tensor], local: list[Tensor], keys: Tensor) -> tuple[Tensor, Terms]:
    """Inv + λ · SIGReg as in eb_jepa, or (1 − λ) · inv + λ · SIGReg as in LeJEPA."""
    terms = {"sigreg": _sliced(loss, views, local, keys)}
    if loss.variant == "bcs":
        terms["inv"] = pair_distance(views, local)
        return terms["inv"] + loss.weight * terms["sigreg"], terms
    terms["inv"] = invariance(views, local)
    return torch.lerp(terms["inv"], terms["sigreg"], loss.weight), terms


def _vicreg_sigreg(
    loss: VicregSigregLoss, views: list[Tensor], local: list[Tensor], keys: Tensor
) -> tuple[Tensor, Terms]:
    """VICReg's eq. 6 + λ · SIGReg."""
    total, terms = _vicreg(loss, views, local, keys)  # pyright: ignore[reportArgumentType]
    terms["sigreg"] = _sliced(loss, views, local, keys)
    return total + loss.sigreg * terms["sigreg"], terms


def _sliced(loss: SigregLoss | VicregSigregLoss, views: list[Tensor], local: list[Tensor], keys: Tensor) -> Tensor:
    return sigreg(torch.stack([*views, *local]), step_seed(keys), slices=loss.slices, variant=loss.variant)


def _nt_xent(loss: NtXentLoss, views: list[Tensor], local: list[Tensor], keys: Tensor) -> tuple[Tensor, Terms]:
    """Mean over all pairs of views with a global one among them."""
    pairs = [*combinations(views, 2), *((view, crop) for view in views for crop in local)]
    total = torch.stack([nt_xent(a, b, loss.temperature) for a, b in pairs]).mean()
    return total, {"nt_xent": total}


LOSSES: dict[str, Callable[[Any, list[Tensor], list[Tensor], Tensor], tuple[Tensor, Terms]]] = {
    "vicreg": _vicreg,
    "sigreg": _sigreg,
    "vicreg_sigreg": _vicreg_sigreg,
    "nt_xent": _nt_xent,
}
