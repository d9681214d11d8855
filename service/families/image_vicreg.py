"""VICReg on two augmented views of an image (Bardes, Ponce and LeCun 2022, arXiv 2105.04906)."""

from __future__ import annotations

import torch

from service.config import ImageVicreg
from service.families.base import Batch, Family, Losses
from service.losses import vicreg_terms
from service.models.encoder import build_encoder
from service.models.projector import projector


class ImageVicregFamily(Family):
    """Encoder, projector and loss: total = λ_inv · inv + λ_std · std + λ_cov · cov (eq. 6)."""

    views = 2

    def __init__(self, config: ImageVicreg, image_size: int) -> None:
        super().__init__()
        self.loss = config.loss
        self.encoder = build_encoder(image_size=image_size, **config.encoder.model_dump())
        head = config.projector
        self.projector = projector(self.encoder.dim, head.hidden, head.output, head.layers, head.norm)

    def forward(self, batch: Batch) -> Losses:
        """Embed (2, B, 3, S, S); both views pass as one batch, so batch norm sees them together."""
        represented = self.encoder(batch.views.flatten(0, 1))
        z1, z2 = self.projector(represented).chunk(2)
        loss = self.loss
        terms = vicreg_terms(z1, z2, gamma=loss.gamma, cov_norm=loss.cov_norm)
        total = loss.inv * terms["inv"] + loss.std * terms["std"] + loss.cov * terms["cov"]
        with torch.no_grad():
            spread = represented.detach().float().std(0)
        values = {name: term.detach() for name, term in terms.items()} | {"feature_std": spread.mean()}
        features = {
            "encoder": represented.detach().unflatten(0, (2, -1)),
            "projector": torch.stack([z1.detach(), z2.detach()]),
        }
        return Losses(total, values, features)
