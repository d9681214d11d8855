"""One split of a sharded data set: its index rows, its labels, and its samples as encoded bytes by sample id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from datasets_prep.errors import UserError
from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index, Shard, Split, parse_array
from service.config import Data
from service.data.decode import Pixels, decode_rgb, fit
from service.data.store import NotFound, Store


def read_index(store: Store) -> Index:
    """Read and check a data set's index; what is missing or malformed is named by URI."""
    try:
        data = store.get(INDEX_NAME)
    except NotFound:
        raise UserError(
            f"{store.uri} holds no {INDEX_NAME}, so it is not a complete data set: check data.uri, or write it with "
            f"'tessera shard SOURCE --out {store.uri}'"
        ) from None
    try:
        return Index.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{store.uri}/{INDEX_NAME} is not an index of a data set this version reads: {error}") from None


def _checked(store: Store, name: str, sha256: str) -> bytes:
    data = store.get(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"{store.uri}/{name} has {len(data)} bytes whose checksum differs from the index: "
            "it was truncated or replaced; shard the data set again"
        )
    return data


@dataclass(frozen=True)
class DataSplit:
    """A split for reading.

    Args:
        store: root of the data set.
        index: of the data set.
        name: of the split.
    """

    store: Store
    index: Index
    name: str

    def __post_init__(self) -> None:
        if self.name not in self.index.splits:
            have = ", ".join(self.index.splits)
            raise UserError(f"{self.store.uri} has no split {self.name!r}, it has: {have}")

    @property
    def rows(self) -> Split:
        """Index rows of the split."""
        return self.index.splits[self.name]

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard, in index order."""
        return tuple(shard.samples for shard in self.rows.shards)

    @property
    def samples(self) -> int:
        """Samples of the split, N."""
        return self.rows.samples

    @property
    def stored_side(self) -> int | None:
        """Side in pixels when all images of the data set are squares of one size, else None."""
        sizes = {*self.index.image_size.min, *self.index.image_size.max}
        return sizes.pop() if len(sizes) == 1 else None

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Labels by sample id, (N,); −1 where there is none."""
        data = _checked(self.store, LABELS_NAME, self.index.labels_sha256)
        return parse_array(data)[self.index.label_slice(self.name)]

    def shard_bytes(self, shard: Shard) -> bytes:
        """Whole tar of a shard, checked against the index."""
        return _checked(self.store, shard.name, shard.sha256)

    def sidecar(self, shard: Shard) -> NDArray[np.void]:
        """Rows (key, offset, size) of a shard's samples, checked against the index."""
        data = _checked(self.store, shard.sidecar, shard.sidecar_sha256)
        return parse_array(data)


def decode_side(split: DataSplit, image_size: int) -> int:
    """Side of the squares that images are decoded to: the stored one, or the view's and an eighth more."""
    return split.stored_side or round(image_size * 8 / 7)


def resolve_mode(split: DataSplit, data: Data) -> Literal["resident", "stream"]:
    """Decide `auto`: resident when the decoded split fits `data.resident_gb`."""
    if data.mode != "auto":
        return data.mode
    decoded = split.samples * 3 * decode_side(split, data.largest_side) ** 2
    return "resident" if decoded <= data.resident_gb * 1e9 else "stream"


def decode_sample(split: DataSplit, shard: Shard, row: np.void, tar: bytes | memoryview, side: int) -> Pixels:
    """Decode one sample of a shard's bytes to (side, side, 3); a bad image is an error that names it."""
    offset, size = int(row["offset"][0]), int(row["size"][0])
    try:
        return fit(decode_rgb(tar[offset : offset + size]), side)
    except ValueError as error:
        name = f"{split.store.uri}/{shard.name}, sample {row['key'].decode()!r}"
        raise UserError(f"{name} is not a readable image: {error}") from error
