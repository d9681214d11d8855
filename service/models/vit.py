"""Vision transformers (Dosovitskiy et al. 2020): timm's parameters, so weights go into `timm.create_model` and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as Timm
from torch import Tensor, nn

from service.models.blocks import (
    Attention,
    attend,
    depth_outputs,
    patch_coordinates,
    rope_angles,
    run_blocks,
    sincos_positions,
    take,
)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}


class Block(TimmBlock):
    """timm's block with its parameters, whose attention may turn and whose paths are dropped by key."""

    fsdp_unit = True  # sharded by itself where parameters are

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor] | None = None,
        fused: bool = True,
        drop: tuple[Tensor, Tensor] | None = None,
        unasked: int = 0,
    ) -> Tensor:
        """Mix tokens and their channels.

        Args:
            x: (B, K, D).
            turn: cosines and sines of the rotary positions, (B or 1, 1, K, E/2) each.
            fused: attention by one kernel, not by two matrix products.
            drop: factors of the two branches, (B, 1, 1) each.
            unasked: first tokens that the output lacks.

        Returns:
            (B, K − unasked, D).
        """
        attended = self.ls1(attend(self.attn, self.norm1(x), turn, fused, unasked))
        x = x[:, unasked:] + (attended if drop is None else attended * drop[0])
        mixed = self.ls2(self.mlp(self.norm2(x)))
        return x + (mixed if drop is None else mixed * drop[1])


class VisionTransformer(Timm):
    """ViT without class token: image → tokens, or their mean.

    Args:
        size: key of `SIZES`.
        patch_size: side of a patch in pixels.
        image_size: side of the training images; others work too, positions are scaled to them.
        depth: blocks, if not those of the size.
        positions: learned, fixed sine-cosine, or rotary in every attention.
        layer_scale: first value of LayerScale (Touvron et al. 2021), none leaves it out.
        drop_path: rate of the last block.
        attention: see `run_blocks`.
        checkpointing: see `run_blocks`.
    """

    def __init__(
        self,
        size: str,
        patch_size: int,
        image_size: int,
        depth: int | None = None,
        positions: str = "learned",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        attention: Attention = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            dynamic_img_size=True,
            pos_embed="none" if positions == "rope" else "learn",
            init_values=layer_scale,
            block_fn=Block,
            **SIZES[size] | ({} if depth is None else {"depth": depth}),
        )
        self.dim, self.trained_grid = self.num_features, (image_size // patch_size,) * 2
        self.options: dict[str, Any] = {"attention": attention, "checkpointing": checkpointing, "drop_path": drop_path}
        if positions == "sincos":
            table = sincos_positions(patch_coordinates(self.trained_grid), self.dim)
            self.pos_embed.requires_grad_(False).copy_(table[None])

    def forward(self, x: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Encode (B, 3, H, W) to (B, D): the mean over all tokens; for the keys see `tokens`."""
        return self.tokens(x, keys_B=keys_B).mean(1)

    def tokens(self, x: Tensor, keep_BK: Tensor | None = None, keys_B: Tensor | None = None) -> Tensor:
        """Encode images to normalised tokens.

        Args:
            x: images (B, 3, H, W).
            keep_BK: raster numbers of the patches to encode; the others are dropped before the first block.
            keys_B: random keys of the samples at this step, for drop path.

        Returns:
            (B, K, D), or (B, H·W / patch², D).
        """
        return self.norm(self.at_depths(x, (len(self.blocks),), keep_BK, keys_B)[0])

    def at_depths(
        self, x: Tensor, depths: Sequence[int], keep_BK: Tensor | None = None, keys_B: Tensor | None = None
    ) -> list[Tensor]:
        """As `tokens`, but those after the blocks numbered `depths` (from 1), not normalised."""
        patches = self.patch_embed(x)
        grid = patches.shape[1], patches.shape[2]
        x = patches.flatten(1, 2)
        if self.pos_embed is not None:
            x = x + self._positions(grid)
        angles = self._angles(grid, x.device)
        if keep_BK is not None:
            x = take(x, keep_BK)
            angles = angles if angles is None else take(angles, keep_BK)
        return depth_outputs(self.blocks, x, depths, angles=angles, keys_B=keys_B, **self.options)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.trained_grid:
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, list(grid), list(self.trained_grid), num_prefix_tokens=0)

    def _angles(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if self.pos_embed is not None:
            return None
        head_dim = self.dim // self.blocks[0].attn.num_heads  # pyright: ignore
        return rope_angles(patch_coordinates(grid, self.trained_grid), head_dim).to(device)[None]


class Predictor(nn.Module):
    """Narrow ViT that predicts target tokens from context tokens (Assran et al. 2023, section 3).

    Args:
        dim: width of the encoder's tokens, D.
        width: of the predictor, P.
        depth: blocks.
        heads: attention heads.
        coordinates: rows and columns of the places that can be asked for, (N, 2) for each level of the
            representation; context tokens lie on the first.
        rope: positions turn queries and keys instead of being added.
        attention: see `depth_outputs`.
        checkpointing: see `depth_outputs`.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int,
        heads: int,
        coordinates: Sequence[Tensor],
        *,
        rope: bool = False,
        attention: Attention = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        levels = len(coordinates)
        self.embed, self.project = nn.Linear(dim, width), nn.ModuleList(nn.Linear(width, dim) for _ in range(levels))
        self.mask_tokens = nn.ParameterList(nn.init.trunc_normal_(torch.empty(width), std=0.02) for _ in range(levels))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.options: dict[str, Any] = {"attention": attention, "checkpointing": checkpointing}
        self.rope = rope
        for level, places in enumerate(coordinates):
            table = rope_angles(places, width // heads) if rope else sincos_positions(places, width)
            self.register_buffer(f"positions{level}", table[None], persistent=False)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, context_BKD: Tensor, context_BK: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """Predict M targets, each for itself, from encoded context tokens.

        Args:
            context_BKD: encoded tokens.
            context_BK: their places on the first level.
            targets: places on each level, (B, M, T) with a T of its own.

        Returns:
            Tokens of each level, (B, M, T, D).
        """
        count = targets[0].shape[1]
        context = self.embed(context_BKD)
        tokens = [token.to(context.dtype) for token in self.mask_tokens]
        queries = torch.cat([token.expand(*t.shape, -1) for token, t in zip(tokens, targets, strict=True)], 2)
        of_context = take(self.positions0, context_BK)
        of_targets = torch.cat([take(getattr(self, f"positions{i}"), part) for i, part in enumerate(targets)], 2)
        if not self.rope:
            context, queries = context + of_context, queries + of_targets
        x = _beside(context, queries, count)
        angles = _beside(of_context, of_targets, count) if self.rope else None
        x = self.norm(run_blocks(self.blocks, x, angles=angles, unasked=context_BK.shape[1], **self.options))
        parts = x.unflatten(0, (-1, count)).split([part.shape[2] for part in targets], 2)
        return [project(part) for project, part in zip(self.project, parts, strict=True)]


def _beside(context_BKP: Tensor, targets_BMTP: Tensor, count: int) -> Tensor:
    """Put the context before each of M targets, (B·M, K + T, P)."""
    repeated = context_BKP[:, None].expand(-1, count, -1, -1)
    return torch.cat([repeated, targets_BMTP.to(context_BKP.dtype)], 2).flatten(0, 1)
