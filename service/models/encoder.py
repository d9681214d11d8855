"""Encoders by name: image (B, 3, H, W) → representation (B, dim)."""

from __future__ import annotations

from torch import Tensor, nn

from service.models.resnet import ResNet

_VIT_SIZES = {"tiny": {"embed_dim": 192, "num_heads": 3}, "small": {"embed_dim": 384, "num_heads": 6}}


class VisionTransformer(nn.Module):
    """ViT of 12 blocks as timm builds it (weights load into timm), without class token, mean-pooled over patches."""

    def __init__(self, size: str, patch_size: int, image_size: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer as Timm  # timm costs seconds to import

        self.vit = Timm(
            img_size=image_size,
            patch_size=patch_size,
            depth=12,
            num_classes=0,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            dynamic_img_size=True,
            **_VIT_SIZES[size],
        )
        self.dim = self.vit.num_features

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to (B, dim)."""
        return self.vit(x)


def build_encoder(kind: str, image_size: int, **options: object) -> nn.Module:
    """Build the encoder of a config's `kind` and its other fields; the module has `dim`, its output width."""
    if kind == "resnet":
        return ResNet(**options)  # pyright: ignore[reportArgumentType]
    return VisionTransformer(image_size=image_size, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
