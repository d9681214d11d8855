"""What passes tokens through transformer blocks: attention that turns by RoPE, paths dropped by key, places.

Shape legend: B samples, K tokens, D width, A heads, E = D / A their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from service.data.draws import key, uniform

Attention = Literal["auto", "fused", "plain"]
_ROPE_BASE = 100.0  # of the lowest frequency; grids have tens of patches where text has thousands of tokens


def run_blocks(blocks: nn.Sequential, x_BKD: Tensor, **options: Any) -> Tensor:
    """Pass tokens through `vit.Block`s; the options are those of `depth_outputs`."""
    return depth_outputs(blocks, x_BKD, (len(blocks),), **options)[0]


def depth_outputs(
    blocks: nn.Sequential,
    x_BKD: Tensor,
    depths: Sequence[int],
    *,
    angles: Tensor | None = None,
    attention: Attention = "auto",
    drop_path: float = 0.0,
    keys_B: Tensor | None = None,
    checkpointing: bool = False,
    unasked: int = 0,
) -> list[Tensor]:
    """Pass tokens through `vit.Block`s and give those after the blocks numbered `depths` (from 1), (B, K, D) each.

    Args:
        blocks: `vit.Block`s, called as modules, so that hooks on them act.
        x_BKD: tokens.
        depths: ascending, repeated where an output is wanted twice.
        angles: of the rotary positions, broadcast to (B, K, E/2); none leaves queries and keys as they are.
        attention: fused (scaled_dot_product_attention), plain (two matrix products), or the faster of the two.
        drop_path: rate of the last block's stochastic depth; the first has none (Huang et al. 2016).
        keys_B: int64 random keys of the samples at this step; needed to drop paths, which happens when training.
        checkpointing: keep no activations inside blocks but compute them again on the way back.
        unasked: first tokens that the last block's output lacks; it attends to them all the same.
    """
    fused = use_fused(x_BKD, attention)
    turn = None if angles is None else (angles.cos()[:, None], angles.sin()[:, None])
    outputs: list[Tensor] = []
    for number, block in enumerate(blocks):
        rate = drop_path * number / max(1, len(blocks) - 1)
        drop = _survivors(keys_B, number, rate, x_BKD) if block.training and rate > 0 else None
        options = turn, fused, drop, unasked if number + 1 == len(blocks) else 0
        if checkpointing and block.training:
            x_BKD = checkpoint(block, x_BKD, *options, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        else:
            x_BKD = block(x_BKD, *options)
        outputs += [x_BKD] * list(depths).count(number + 1)
    return outputs


def attend(attn: nn.Module, x: Tensor, turn: tuple[Tensor, Tensor] | None, fused: bool, unasked: int) -> Tensor:
    """Self-attention of `x` (B, K, D), (B, K − unasked, D); arguments as `vit.Block` takes them."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, A, K, E) each
    if turn is not None:
        q, k = (_rotate(t, *turn) for t in (q, k))
    q = q[:, :, unasked:]
    if fused:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        y = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    return attn.proj(y.transpose(1, 2).flatten(2))


def _survivors(keys_B: Tensor | None, number: int, rate: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a block's two branches, (B, 1, 1) each: 0 for dropped samples, 1 / (1 − rate) for the others."""
    assert keys_B is not None, "drop path needs keys"
    kept = uniform(key(number), keys_B, 2) >= rate
    first, second = (kept / (1 - rate)).to(x.dtype)[..., None, None].unbind(1)
    return first, second


def use_fused(x: Tensor, attention: Attention) -> bool:
    """Decide `auto`: fused attention, but for bf16 on CPUs, where two plain products are faster (measured)."""
    if attention != "auto":
        return attention == "fused"
    bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled(x.device.type)
    return not (x.device.type == "cpu" and bf16)


def sincos_positions(coordinates_N2: Tensor, dim: int) -> Tensor:
    """Sine-cosine embedding of rows and columns, (N, D): half of D for each (Vaswani et al. 2017).

    Raises:
        ValueError: D is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"width {dim} must be divisible by 4 for sine-cosine positions")
    frequency = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    parts = [coordinates_N2[:, axis, None] * frequency for axis in (0, 1)]
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], 1).float()


def rope_angles(coordinates_N2: Tensor, head_dim: int) -> Tensor:
    """Angles of 2-D rotary positions, (N, E/2): a quarter of E turns with the row, a quarter with the column.

    Su et al. 2021; axial form of Heo et al. 2024, section 3.
    """
    if head_dim % 4:
        raise ValueError(f"head width {head_dim} must be divisible by 4 for 2-D rotary positions")
    frequency = _ROPE_BASE ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    return torch.cat([coordinates_N2[:, axis, None] * frequency for axis in (0, 1)], 1).float()


def patch_coordinates(grid: tuple[int, int], trained: tuple[int, int] | None = None) -> Tensor:
    """Row and column of each patch in raster order, (H·W, 2) float64, scaled to the extent of the trained grid."""
    scale = [1.0, 1.0] if trained is None else [trained[0] / grid[0], trained[1] / grid[1]]
    rows_columns = torch.cartesian_prod(*(torch.arange(extent, dtype=torch.float64) for extent in grid))
    return rows_columns * torch.tensor(scale, dtype=torch.float64)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + E/2) of (B, A, K, E) by angles (B, 1, K, E/2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def take(x_BND: Tensor, patches: Tensor) -> Tensor:
    """Tokens at raster numbers: x (B or 1, N, D), patches (B, …) → (B, …, D)."""
    flat = patches.flatten(1)
    x = x_BND.expand(len(flat), -1, -1)
    return x.gather(1, flat[..., None].expand(-1, -1, x.shape[-1])).unflatten(1, patches.shape[1:])
