"""VICReg on two augmented views of an image (Bardes, Ponce and LeCun 2022, arXiv 2105.04906)."""

from __future__ import annotations

from service.config import ImageVicreg
from service.families.base import Batch, Embedded, Family, Losses
from service.losses import vicreg_terms
from service.models.encoder import build_encoder
from service.models.projector import projector


class ImageVicregFamily(Family):
    """Encoder, projector and loss: total = λ_inv · inv + λ_std · std + λ_cov · cov (eq. 6)."""

    views = 2
    batch_statistics = True

    def __init__(self, config: ImageVicreg, image_size: int) -> None:
        super().__init__()
        self.loss = config.loss
        self.encoder = build_encoder(image_size=image_size, **config.encoder.model_dump())
        head = config.projector
        self.projector = projector(self.encoder.dim, head.hidden, head.output, head.layers, head.norm)

    def embed(self, batch: Batch) -> Embedded:
        """Embed (2, B, 3, S, S) to `encoder` and `projector`, (B, 2, D) each.

        Both views pass as one batch, so batch norm sees them together.
        """
        represented = self.encoder(batch.views.flatten(0, 1))
        both = {"encoder": represented.detach(), "projector": self.projector(represented)}
        return {name: z.unflatten(0, (2, -1)).transpose(0, 1) for name, z in both.items()}

    def losses(self, embedded: Embedded, batch: Batch) -> Losses:
        """Compute VICReg's terms over the global batch."""
        z1, z2 = embedded["projector"].unbind(1)
        loss = self.loss
        terms = vicreg_terms(z1, z2, gamma=loss.gamma, cov_norm=loss.cov_norm)
        total = loss.inv * terms["inv"] + loss.std * terms["std"] + loss.cov * terms["cov"]
        values = {name: term.detach() for name, term in terms.items()}
        values["feature_std"] = embedded["encoder"].float().flatten(0, 1).std(0).mean()
        return Losses(total, values, {name: z.detach().transpose(0, 1) for name, z in embedded.items()})
