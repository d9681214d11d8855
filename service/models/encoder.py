"""Encoders by name: image (B, 3, H, W) → representation (B, dim)."""

from __future__ import annotations

from torch import nn

from service.models.resnet import ResNet


def build_encoder(kind: str, image_size: int, **options: object) -> nn.Module:
    """Build the encoder of a config's `kind` and its other fields; the module has `dim`, its output width."""
    if kind == "resnet":
        return ResNet(**options)  # pyright: ignore[reportArgumentType]
    from service.models.vit import VisionTransformer  # timm costs seconds to import

    return VisionTransformer(image_size=image_size, **options)  # pyright: ignore[reportArgumentType]
