"""A vision transformer read at several depths, each pooled further in two dimensions, as a feature pyramid.

Tokens lie in nested order (`service.masks.nested_order`): 4ˡ consecutive ones are a square of 2ˡ×2ˡ patches, so that
2-D pooling is a mean over neighbours in memory, and works as well on a context that consists of whole cells.

Shape legend: B samples, L levels, K tokens, of which K_l remain on level l, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.masks import nested_order
from service.models.blocks import patch_coordinates
from service.models.vit import VisionTransformer


class Pyramid(nn.Module):
    """Lateral 1×1 maps and a top-down path (Lin et al. 2017) without the 3×3 convolutions that masks would cut.

    The coarsest level is its lateral map; each finer one adds the coarser one's nearest-neighbour upsampling to its
    own, or maps both, concatenated, back to the width.
    """

    def __init__(self, dim: int, levels: int, fusion: Literal["add", "concat"]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Linear(dim, dim) for _ in range(levels))
        joined = levels - 1 if fusion == "concat" else 0
        self.fuse = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(joined))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Mix levels, finest first, (B, K_l, D) in nested order each."""
        fused = [self.lateral[-1](levels[-1])]
        for number in range(len(levels) - 2, -1, -1):
            own = self.lateral[number](levels[number])
            above = fused[0].repeat_interleave(own.shape[1] // fused[0].shape[1], 1)
            both = self.fuse[number](torch.cat([own, above], -1)) if self.fuse else own + above
            fused.insert(0, both)
        return fused


class PyramidTransformer(VisionTransformer):
    """ViT whose representation has levels: the patch grid, 2×2 pooled, 4×4 pooled …, at increasing depths.

    Tokens of the last block pass timm's final norm, those of earlier blocks a layer norm without parameters.

    Args:
        levels: number of levels, L.
        whole_image: the last level is one token, the mean of all.
        depths: block that each level is taken after; none spreads them evenly, up to the last.
        fpn: mix the levels (`Pyramid`), or leave them.
        eval_level: level, from 1, that `forward` gives; "all" concatenates them, none gives the last.
        options: of `VisionTransformer`.
    """

    def __init__(
        self,
        levels: int,
        *,
        whole_image: bool = False,
        depths: tuple[int, ...] | None = None,
        fpn: Literal["add", "concat"] | None = None,
        eval_level: int | Literal["all"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        blocks, width = len(self.blocks), self.dim
        self.levels, self.whole_image = levels, whole_image
        self.depths = depths or tuple(max(1, round(blocks * (level + 1) / levels)) for level in range(levels))
        self.fpn = None if fpn is None else Pyramid(width, levels, fpn)
        parts = {f"level{level + 1}": slice(level * width, (level + 1) * width) for level in range(levels)}
        chosen = slice(0, levels * width) if eval_level == "all" else parts[f"level{eval_level or levels}"]
        self.parts, self.dim = {"trained": chosen} | parts, chosen.stop - chosen.start
        unit = 2 ** (levels - 1 - whole_image)
        order = torch.from_numpy(nested_order(self.trained_grid, unit))
        self.register_buffer("order", order[None], persistent=False)  # raster number of each place
        self.register_buffer("rank", order.argsort(), persistent=False)  # place of each raster number

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to the evaluated level's mean over all tokens, (B, dim)."""
        return self.every_level(x).flatten(1)[:, self.parts["trained"]]

    def every_level(self, x: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Mean over the tokens of each level, (B, L, D), at any resolution."""
        return self._means(self._normalised(x, None, keys_B))

    def pyramid(self, x: Tensor, keys_B: Tensor | None = None) -> list[Tensor]:
        """Encode images of the trained size to the tokens of each level, finest first, (B, N_l, D) in nested order."""
        return self._mixed([self.pool(t, level) for level, t in enumerate(self._normalised(x, self.order, keys_B))])

    def context(self, x: Tensor, keep_BK: Tensor, keys_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode some patches, and nothing of the others.

        Args:
            x: images of the trained size, (B, 3, H, W).
            keep_BK: raster numbers of the patches, whole cells of the coarsest grid.
            keys_B: random keys of the samples at this step, for drop path.

        Returns:
            Tokens of the patches in nested order, (B, K, D), of the finest level of `Pyramid` or else of the last
            block; and the mean of each level, (B, L, D).
        """
        depths = self._normalised(x, self.order[0][self._ranks(keep_BK)], keys_B)
        if self.fpn is None:
            return depths[-1], self._means(depths)
        return self._mixed([self.pool(t, level) for level, t in enumerate(depths)])[0], self._means(depths)

    def places(self, patches: Tensor) -> list[Tensor]:
        """Numbers on each level of the cells that patches (…, T), given by raster numbers, fill: (…, T_l)."""
        ranks = self._ranks(patches)
        places = [ranks[..., :: 4**level] // 4**level for level in range(self.levels)]
        if self.whole_image:
            places[-1] = torch.zeros_like(places[-1][..., :1])
        return places

    def coordinates(self) -> list[Tensor]:
        """Row and column, in patches, of the centre of each cell of each level, (K_l, 2)."""
        of_patches = patch_coordinates(self.trained_grid)[self.order]
        return [self.pool(of_patches, level)[0] for level in range(self.levels)]

    def pool(self, tokens_BKD: Tensor, level: int) -> Tensor:
        """Mean over the squares of 2ˡ×2ˡ patches that make a level's cells: (B, K, D) in nested order → (B, K_l, D)."""
        if self.whole_image and level == self.levels - 1:
            return tokens_BKD.mean(1, keepdim=True)
        return tokens_BKD.unflatten(1, (-1, 4**level)).mean(2)

    def _mixed(self, levels: list[Tensor]) -> list[Tensor]:
        return levels if self.fpn is None else self.fpn(levels)

    def _means(self, depths: list[Tensor]) -> Tensor:
        """Mean of each level from those of its depth: pooling keeps it, and `Pyramid` is linear."""
        return torch.cat(self._mixed([tokens.mean(1, keepdim=True) for tokens in depths]), 1)

    def _ranks(self, patches: Tensor) -> Tensor:
        return self.rank[patches].sort(-1)[0]

    def _normalised(self, x: Tensor, keep_BK: Tensor | None, keys_B: Tensor | None) -> list[Tensor]:
        kept = None if keep_BK is None else keep_BK.expand(len(x), -1)
        *earlier, last = self.at_depths(x, self.depths, kept, keys_B)
        blocks, width = len(self.blocks), last.shape[-1:]
        norms = [self.norm if depth == blocks else None for depth in self.depths]
        return [F.layer_norm(t, width) if n is None else n(t) for n, t in zip(norms, (*earlier, last), strict=True)]
