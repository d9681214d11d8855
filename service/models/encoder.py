"""Encoders by name: image (B, 3, H, W) → representation (B, dim)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from service.models.resnet import ResNet


def build_encoder(kind: str, image_size: int, **options: object) -> nn.Module:
    """Build the encoder of a config's `kind` and its other fields; the module has `dim`, its output width."""
    if kind == "resnet":
        return ResNet(**options)  # pyright: ignore[reportArgumentType]
    from service.models.vit import VisionTransformer  # timm costs seconds to import

    if kind == "pyramid":
        from service.models.pyramid import PyramidTransformer

        return PyramidTransformer(image_size=image_size, **options)  # pyright: ignore[reportArgumentType]
    return VisionTransformer(image_size=image_size, **options)  # pyright: ignore[reportArgumentType]


class _EveryLevel(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.every_level(x).flatten(1)


def every_level(encoder: Any) -> tuple[nn.Module, dict[str, slice]]:
    """Give all levels side by side, (B, 3, H, W) → (B, L·D), and which dimensions are which.

    `trained` names those that the encoder itself gives: all, of an encoder without levels.
    """
    parts = getattr(encoder, "parts", None)
    return (encoder, {"trained": slice(None)}) if parts is None else (_EveryLevel(encoder), parts)
