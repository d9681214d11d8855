"""What a split looks like: its classes, and sizes, colours and bytes of some of its images, read one by one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets_prep.errors import UserError
from datasets_prep.index import parse_array
from datasets_prep.permute import key, permutation
from service.data.decode import Pixels, decode_rgb
from service.data.split import DataSplit, checked

_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_REQUESTS = 8  # shards that are read from at a time


@dataclass(frozen=True)
class Picture:
    """One image of a split: sample id, key, label, encoded bytes and RGB pixels (H, W, 3)."""

    id: int
    key: str
    label: int
    data: bytes
    pixels: Pixels


@dataclass(frozen=True)
class Survey:
    """Figures of a split; those of images are of a random sample of them.

    Args:
        samples: images of the split.
        classes: images of each class, by name.
        surveyed: images that were looked at.
        width: quantiles 0, 0.05, 0.5, 0.95 and 1 of the images' widths in pixels.
        height: as `width`.
        bytes: as `width`, of encoded images.
        mean: of red, green and blue in [0, 1], each image with the same weight.
        std: as `mean`.
    """

    samples: int
    classes: dict[str, int]
    surveyed: int
    width: list[int]
    height: list[int]
    bytes: list[int]
    mean: list[float]
    std: list[float]


def choose(labels: NDArray[np.int32], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Choose up to `count` sample ids at random, of every class as many as can be, sorted by class."""
    order = permutation(key(seed), len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[by_class]
    rank = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    chosen = np.lexsort((np.argsort(order)[by_class], rank))[:count]
    return by_class[np.sort(chosen)]


def read_pictures(split: DataSplit, ids: NDArray[np.int64]) -> list[Picture]:
    """Read samples by id, without the rest of their shards.

    Raises:
        UserError: an image that cannot be decoded, or an object that is not what the index says.
    """
    starts = np.cumsum([0, *split.shard_samples])
    numbers = np.searchsorted(starts, ids, side="right") - 1

    def read(number: int) -> list[Picture]:
        return _read(split, number, ids[numbers == number], int(starts[number]))

    with ThreadPoolExecutor(_REQUESTS) as pool:
        found = {each.id: each for pictures in pool.map(read, np.unique(numbers).tolist()) for each in pictures}
    return [found[sample] for sample in ids.tolist()]


def _read(split: DataSplit, number: int, ids: NDArray[np.int64], start: int) -> list[Picture]:
    shard = split.rows.shards[number]
    rows = parse_array(checked(split.store, shard.sidecar, shard.sidecar_sha256))[ids - start]
    contents = split.store.ranges(shard.name, rows["offset"][:, 0].tolist(), rows["size"][:, 0].tolist())
    return [
        _picture(split, shard.name, int(id_), row, data) for id_, row, data in zip(ids, rows, contents, strict=True)
    ]


def _picture(split: DataSplit, shard: str, id_: int, row: Any, data: bytes) -> Picture:
    name = row["key"].decode(errors="replace")
    try:
        pixels = decode_rgb(data)
    except ValueError as error:
        raise UserError(
            f"{split.store.uri}/{shard}, sample {name!r} is not a readable image: {error}: "
            f"find all faults with `tessera verify {split.store.uri}`"
        ) from error
    return Picture(id_, name, int(split.labels[id_]), data, pixels)


def survey(split: DataSplit, images: int = 256, seed: int = 0) -> Survey:
    """Take the figures of a split, those of images from `images` random ones."""
    ids = permutation(key(seed), split.samples)[:images]
    pictures = read_pictures(split, ids)
    names = split.index.classes
    counts = np.bincount(split.labels[split.labels >= 0], minlength=len(names)).tolist()
    mean, std = _colour([picture.pixels for picture in pictures])
    return Survey(
        samples=split.samples,
        classes=dict(zip(names, counts, strict=True)) if split.labels.max() >= 0 else {},
        surveyed=len(pictures),
        width=_quantiles([picture.pixels.shape[1] for picture in pictures]),
        height=_quantiles([picture.pixels.shape[0] for picture in pictures]),
        bytes=_quantiles([len(picture.data) for picture in pictures]),
        mean=mean,
        std=std,
    )


def _quantiles(values: Sequence[int]) -> list[int]:
    return [int(value) for value in np.quantile(values, _QUANTILES, method="nearest")]


def _colour(images: Sequence[Pixels]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel."""
    first = np.mean([image.mean((0, 1), dtype=np.float64) for image in images], 0) / 255
    second = (
        np.mean([np.square(image, dtype=np.float32).mean((0, 1), dtype=np.float64) for image in images], 0) / 255**2
    )
    return first.tolist(), np.sqrt(np.maximum(second - first**2, 0)).tolist()
