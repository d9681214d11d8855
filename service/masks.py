"""Which patches an encoder sees and which a predictor has to predict: a pure function of (seed, step, position).

A draw is made for positions of the global batch, so that any slice of it is the same on every rank. Block sizes are
drawn once a step, places once an image, and token counts never change, so a compiled step is never compiled again.

Two flaws of the published I-JEPA collator are not repeated: it never places a block at the last row or column and
trims contexts in raster order, so that bottom patches are hardly ever context. Its own algorithm is `Reference`.

Shape legend: B images, M target blocks, K tokens of a context, T of a target, N = H·W patches of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets_prep.permute import hash_numpy, key

Patches = NDArray[np.int64]
Range = tuple[float, float]

MIN_CONTEXT = 4  # patches; fewer say next to nothing about an image
_TRIES = 8  # places that an image may draw until enough of its context is left
_LATTICE = 8  # scales, and as many aspects, that block sizes are drawn from
_LARGEST = np.iinfo(np.uint64).max
_PROBED = (64, 64)  # steps and images that the number of context tokens is measured on


class Masks(NamedTuple):
    """Raster numbers of patches in ascending order: context (B, K), targets (B, M, T)."""

    context: Patches
    targets: Patches


@dataclass(frozen=True)
class Blocks:
    """Rectangles: how many, their area as a share of the grid, and height ÷ width, drawn log-uniformly."""

    count: int
    scale: Range
    aspect: Range = (1.0, 1.0)

    def sizes(self, grid: tuple[int, int]) -> Patches:
        """All (height, width) in patches that are drawn, each row equally likely, (64, 2)."""
        middles = (np.arange(_LATTICE) + 0.5) / _LATTICE
        area = (self.scale[0] + middles * (self.scale[1] - self.scale[0]))[:, None] * (grid[0] * grid[1])
        low, high = np.log(self.aspect)
        aspect = np.exp(low + middles * (high - low))[None, :]
        sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], -1).reshape(-1, 2)
        return np.clip(np.rint(sides), 1, grid).astype(np.int64)


@dataclass(frozen=True)
class Multiblock:
    """Context blocks minus target blocks (Assran et al. 2023, section 3), the union of them where there are several.

    The centre of a block is uniform over the grid and the block is pushed inside, so that corners are covered too.
    The context keeps `context_tokens` patches chosen at random, as many as 95 % of all draws leave; an image that
    leaves fewer draws again.

    Args:
        grid: patches (H, W).
        contexts: blocks whose union is the context.
        targets: blocks to predict, one prediction each; they may overlap one another, never the context.

    Raises:
        ValueError: the targets leave no context.
    """

    grid: tuple[int, int]
    contexts: Blocks
    targets: Blocks

    def __post_init__(self) -> None:
        largest = int(self.targets.sizes(self.grid).prod(1).max())
        if min(self.context_tokens, self.grid[0] * self.grid[1] - largest) < MIN_CONTEXT:
            raise ValueError(
                f"targets.scale={self.targets.scale} × {self.targets.count} leaves no context on a "
                f"{self.grid[0]}×{self.grid[1]} grid (needs ≥ {MIN_CONTEXT} patches): lower the scale or the count, "
                "raise contexts.scale or use a smaller patch"
            )

    @cached_property
    def target_tokens(self) -> int:
        """Tokens of a target, T: those of the smallest block; of larger ones some are left out at random."""
        return int(self.targets.sizes(self.grid).prod(1).min())

    @cached_property
    def context_tokens(self) -> int:
        """Tokens of a context, K."""
        steps, images = _PROBED
        left = np.concatenate([self._layout(0, step, np.arange(images), 0)[1].sum((1, 2)) for step in range(steps)])
        most = self.grid[0] * self.grid[1] - int(self.targets.sizes(self.grid).prod(1).max())
        return min(int(np.quantile(left, 0.05)), most)

    def draw(self, seed: int, step: int, start: int, stop: int) -> Masks:
        """Masks of positions `start` … `stop − 1` of the global batch of a step."""
        positions = np.arange(start, stop)
        blocks, context = self._layout(seed, step, positions, 0)
        for attempt in range(1, _TRIES + 1):
            short = np.flatnonzero(context.sum((1, 2)) < self.context_tokens)
            if not len(short):
                break
            last = attempt == _TRIES
            blocks[short], context[short] = self._layout(seed, step, positions[short], attempt, stacked=last)
        kept = _choose(key(seed, step, 3), positions, context.reshape(len(positions), -1), self.context_tokens)
        return Masks(kept, self._tokens(seed, step, positions, blocks))

    def _layout(
        self, seed: int, step: int, positions: Patches, attempt: int, *, stacked: bool = False
    ) -> tuple[Patches, NDArray[np.bool_]]:
        """Corners of the targets, (B, M, 2), and what they leave of the context, (B, H, W).

        The last attempt stacks the targets on one place and lets the context be everything else.
        """
        places = _uniform(key(seed, step, 1, attempt), positions, 2 * (self.targets.count + self.contexts.count))
        places = places.reshape(len(positions), -1, 2)
        target_size, context_size = self._sizes(seed, step)
        corners = _corners(places[:, : self.targets.count], target_size, self.grid)
        if stacked:
            corners[:] = corners[:, :1]
            return corners, ~_cover(corners, target_size, self.grid)
        of_context = _corners(places[:, self.targets.count :], context_size, self.grid)
        return corners, _cover(of_context, context_size, self.grid) & ~_cover(corners, target_size, self.grid)

    def _sizes(self, seed: int, step: int) -> tuple[Patches, Patches]:
        numbers = hash_numpy(key(seed, step, 2), np.arange(2)) % _LATTICE**2
        targets, contexts = self._lattices
        return targets[numbers[0]], contexts[numbers[1]]

    @cached_property
    def _lattices(self) -> tuple[Patches, Patches]:
        return self.targets.sizes(self.grid), self.contexts.sizes(self.grid)

    def _tokens(self, seed: int, step: int, positions: Patches, corners: Patches) -> Patches:
        """Patches of the targets at `corners`, (B, M, T)."""
        height, width = self._sizes(seed, step)[0]
        inside = (np.arange(height)[:, None] * self.grid[1] + np.arange(width)).ravel()
        first = (corners @ np.array([self.grid[1], 1]))[..., None]
        if len(inside) == self.target_tokens:
            return first + inside
        numbers = positions[:, None] * self.targets.count + np.arange(self.targets.count)
        everything = np.ones((numbers.size, len(inside)), bool)
        kept = _choose(key(seed, step, 4), numbers.ravel(), everything, self.target_tokens)
        return first + inside[kept].reshape(*numbers.shape, -1)


@dataclass(frozen=True)
class Random:
    """Patches chosen one by one: one target of a share `ratio` of them, the rest is the context."""

    grid: tuple[int, int]
    ratio: float

    def __post_init__(self) -> None:
        if self.context_tokens < MIN_CONTEXT or self.context_tokens == self.grid[0] * self.grid[1]:
            raise ValueError(
                f"ratio={self.ratio} of a {self.grid[0]}×{self.grid[1]} grid leaves {self.context_tokens} patches of "
                f"context (needs ≥ {MIN_CONTEXT}, and a target): choose another ratio or patch size"
            )

    @property
    def context_tokens(self) -> int:
        """Tokens of a context, K."""
        patches = self.grid[0] * self.grid[1]
        return patches - round(self.ratio * patches)

    def draw(self, seed: int, step: int, start: int, stop: int) -> Masks:
        """Masks of positions `start` … `stop − 1` of the global batch of a step."""
        patches = self.grid[0] * self.grid[1]
        order = np.argsort(_scores(key(seed, step, 5), np.arange(start, stop), patches), axis=1, kind="stable")
        context, target = order[:, : self.context_tokens], order[:, self.context_tokens :]
        return Masks(np.sort(context, axis=1), np.sort(target, axis=1)[:, None])


@dataclass(frozen=True)
class Reference:
    """The published I-JEPA collator's algorithm, for comparison, its biases included.

    One random number decides both scale and aspect; blocks stay one patch smaller than the grid and off its last row
    and column; a context is valid with more than `min_keep` patches, and after every 20 failures it may overlap one
    more target; contexts and targets are cut to the batch's smallest in raster order, so their number differs by step
    and, unlike everywhere else, the masks of a slice are not a slice of the masks.

    Raises:
        ValueError: a block size that the published code would look for a place for without end.
    """

    grid: tuple[int, int]
    contexts: Blocks
    targets: Blocks
    min_keep: int = 10

    def __post_init__(self) -> None:
        for name in ("targets", "contexts"):
            blocks: Blocks = getattr(self, name)
            least = min(int(np.prod(self._size(blocks, u))) for u in np.linspace(0, 1, 1001))
            if least <= self.min_keep:
                raise ValueError(
                    f"{name}.scale={blocks.scale} makes blocks of {least} patches on a {self.grid[0]}×{self.grid[1]} "
                    f"grid, and min_keep={self.min_keep} asks for more: lower min_keep or use smaller patches"
                )

    @property
    def context_tokens(self) -> int:
        """Most tokens of a context."""
        return int(np.prod(self._size(self.contexts, 1.0)))

    def _size(self, blocks: Blocks, u: float) -> tuple[int, int]:
        """Height and width of a step's blocks from one number in [0, 1]."""
        area = int(self.grid[0] * self.grid[1] * (blocks.scale[0] + u * (blocks.scale[1] - blocks.scale[0])))
        aspect = blocks.aspect[0] + u * (blocks.aspect[1] - blocks.aspect[0])
        sides = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        return min(sides[0], self.grid[0] - 1), min(sides[1], self.grid[1] - 1)

    def draw(self, seed: int, step: int, start: int, stop: int) -> Masks:
        """Masks of the batch that consists of positions `start` … `stop − 1`."""
        positions = np.arange(start, stop)
        u = _uniform(key(seed, step, 6), np.arange(1), 2)[0]
        size, context_size = self._size(self.targets, u[0]), self._size(self.contexts, u[1])
        count = self.targets.count
        places = _uniform(key(seed, step, 7), positions, 2 * count).reshape(len(positions), count, 2)
        corners = self._corners(places, size)
        taken = np.stack([_cover(corners[:, m : m + 1], size, self.grid) for m in range(count)], 1)
        context = self._contexts(key(seed, step, 8), positions, taken, context_size)
        inside = (np.arange(size[0])[:, None] * self.grid[1] + np.arange(size[1])).ravel()
        targets = (corners @ np.array([self.grid[1], 1]))[..., None] + inside
        fewest = int(context.sum(1).min())
        return Masks(np.argsort(~context, axis=1, kind="stable")[:, :fewest], targets)

    def _corners(self, places: NDArray[np.float64], size: tuple[int, int]) -> Patches:
        return np.floor(places * (np.array(self.grid) - size)).astype(np.int64)

    def _contexts(
        self, key_: int, positions: Patches, taken: NDArray[np.bool_], size: tuple[int, int]
    ) -> NDArray[np.bool_]:
        """Contexts (B, N): blocks outside the targets, of which one is given up after every 20 failures."""
        context = np.zeros((len(positions), self.grid[0] * self.grid[1]), bool)
        pending = np.arange(len(positions))
        attempt = 0
        while len(pending):
            avoided = max(taken.shape[1] - attempt // 20, 0)
            corners = self._corners(_uniform(key(key_, attempt), positions[pending], 2)[:, None], size)
            free = _cover(corners, size, self.grid) & ~taken[pending, :avoided].any(1)
            context[pending] = free.reshape(len(pending), -1)
            pending = pending[context[pending].sum(1) <= self.min_keep]
            attempt += 1
        return context


@dataclass(frozen=True)
class Coarse:
    """Masks drawn on a grid of `unit`×`unit` cells: what a pooled level would mix is context or target as a whole."""

    masking: Masking
    width: int  # cells
    unit: int

    @property
    def context_tokens(self) -> int:
        """Patches of a context."""
        return self.masking.context_tokens * self.unit**2

    def draw(self, seed: int, step: int, start: int, stop: int) -> Masks:
        """Masks of positions `start` … `stop − 1`, in patches."""
        return Masks(*(refine(cells, self.width, self.unit) for cells in self.masking.draw(seed, step, start, stop)))


Masking = Multiblock | Random | Reference | Coarse


def refine(cells: Patches, width: int, unit: int) -> Patches:
    """Patches of cells: (…, K) raster numbers on a grid `width` cells wide → (…, K · unit²), ascending."""
    row, column = np.divmod(cells, width)
    offset = np.arange(unit)
    rows = row[..., None, None] * unit + offset[:, None]
    columns = column[..., None, None] * unit + offset
    return np.sort((rows * width * unit + columns).reshape(*cells.shape[:-1], -1), axis=-1)


def nested_order(grid: tuple[int, int], unit: int) -> Patches:
    """Raster numbers of all patches, cell of `unit`×`unit` after cell, inside a cell in Morton's order, (N,).

    In this order 4ˡ patches in a row, from a multiple of 4ˡ on, are a square of 2ˡ×2ˡ, for all 2ˡ ≤ `unit`.
    """
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    place = (row // unit * (grid[1] // unit) + column // unit) * unit**2
    for bit in range(unit.bit_length() - 1):
        place += ((row >> bit & 1) << 2 * bit + 1) + ((column >> bit & 1) << 2 * bit)
    return np.argsort(place)


def curriculum(first: Multiblock, last: Multiblock, stages: int) -> tuple[Multiblock, ...]:
    """Stages from `first` to `last`: scales linear, numbers of target blocks rounded."""

    def between(a: float, b: float, t: float) -> float:
        return a + t * (b - a)

    def blocks(a: Blocks, b: Blocks, t: float) -> Blocks:
        scale = between(a.scale[0], b.scale[0], t), between(a.scale[1], b.scale[1], t)
        return Blocks(round(between(a.count, b.count, t)), scale, a.aspect)

    return tuple(
        Multiblock(first.grid, blocks(first.contexts, last.contexts, t), blocks(first.targets, last.targets, t))
        for t in np.linspace(0, 1, stages)
    )


def coverage(masks: Masks, patches: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of images in which each patch is context, and in which it is a target, (N,) each."""
    images = len(masks.context)
    seen, asked = (np.zeros((images, patches), bool) for _ in range(2))
    np.put_along_axis(seen, masks.context, True, 1)
    np.put_along_axis(asked, masks.targets.reshape(images, -1), True, 1)
    return seen.mean(0), asked.mean(0)


def _scores(key_: int, positions: Patches, columns: int) -> NDArray[np.uint64]:
    """Random numbers of positions, (B, columns)."""
    return hash_numpy(0, hash_numpy(key_, positions)[:, None] ^ hash_numpy(key(key_), np.arange(columns)))


def _uniform(key_: int, positions: Patches, columns: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1), (B, columns)."""
    return (_scores(key_, positions, columns) >> np.uint64(11)) * 2.0**-53


def _corners(places: NDArray[np.float64], size: Patches, grid: tuple[int, int]) -> Patches:
    """Top left corners (…, 2) of blocks whose centres lie at `places` in [0, 1)², pushed inside the grid."""
    return np.clip(np.floor(places * grid - size / 2 + 0.5), 0, np.array(grid) - size).astype(np.int64)


def _cover(corners: Patches, size: Patches | tuple[int, int], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Patches that blocks at `corners` (B, M, 2) cover together, (B, H, W)."""
    starts = (corners[..., axis, None] for axis in (0, 1))
    rows, columns = (
        ((np.arange(extent) >= start) & (np.arange(extent) < start + side)).astype(np.float32)
        for extent, start, side in zip(grid, starts, size, strict=True)
    )
    return rows.transpose(0, 2, 1) @ columns > 0  # how many blocks cover each patch


def _choose(key_: int, positions: Patches, allowed: NDArray[np.bool_], count: int) -> Patches:
    """Choose `count` of the allowed columns of each row at random, (B, count), ascending."""
    scores = _scores(key_, positions, allowed.shape[1])
    scores[~allowed] = _LARGEST
    highest = np.partition(scores, count - 1, axis=1)[:, count - 1 : count]
    found = np.flatnonzero(scores <= highest).reshape(-1, count)  # 64-bit scores of a row never tie
    return found - np.arange(len(scores))[:, None] * scores.shape[1]
