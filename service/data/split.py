"""One split of a sharded data set: its index rows, its labels, and its samples as encoded bytes by sample id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from datasets_prep.errors import UserError
from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index, Shard, Split, parse_array
from service.config import Data, canonical_partitions
from service.data.draws import key
from service.data.plan import MixturePlan, Plan, SamplePlan
from service.data.store import NotFound, Store

_WINDOW = 4096  # larger ones shuffle hardly better and open more shards


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


def mismatch(store: Store, name: str, size: int) -> UserError:
    """Error of an object that is not the one the index describes."""
    return UserError(
        f"{store.uri}/{name} has {size} bytes whose checksum differs from the index: "
        "it was truncated or replaced; shard the data set again"
    )


def checked(store: Store, name: str, sha256: str) -> bytes:
    """Read a whole object; UserError when its checksum differs."""
    data = store.get(name)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise mismatch(store, name, len(data))
    return data


@dataclass(frozen=True)
class OpenShard:
    """A shard whose bytes are at hand.

    Args:
        uri: of the tar.
        tar: its bytes.
        rows: its sidecar, (key, offset, size) of each sample.
    """

    uri: str
    tar: memoryview
    rows: NDArray[np.void]

    def encoded(self, row: int) -> memoryview:
        """Bytes of a sample's content."""
        offset, size = int(self.rows["offset"][row, 0]), int(self.rows["size"][row, 0])
        return self.tar[offset : offset + size]

    def fault(self, row: int, error: ValueError) -> str:
        """Say by name that a sample cannot be decoded."""
        key = self.rows["key"][row].decode(errors="replace")
        return f"{self.uri}, sample {key!r} is not a readable image: {error}"


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
        labels = self._array(LABELS_NAME, checked(self.store, LABELS_NAME, self.index.labels_sha256))
        found = labels[self.index.label_slice(self.name)]
        if len(found) != self.samples or found.min(initial=0) < -1 or found.max(initial=-1) >= len(self.index.classes):
            raise UserError(
                f"{self.store.uri}/{LABELS_NAME} has {len(found)} labels from {found.min(initial=0)} to "
                f"{found.max(initial=0)} for the {self.samples} samples of {self.name!r} and "
                f"{len(self.index.classes)} classes of the index: shard the data set again"
            )
        return found

    def open_shard(self, shard: Shard, read: Callable[[Store, str, str], bytes | memoryview] = checked) -> OpenShard:
        """Read a shard and its sidecar, and refuse what does not hold together.

        Args:
            shard: of this split.
            read: returns an object's bytes by store, name and checksum.
        """
        rows = self._array(shard.sidecar, read(self.store, shard.sidecar, shard.sidecar_sha256))
        tar = memoryview(read(self.store, shard.name, shard.sha256))
        uri = f"{self.store.uri}/{shard.name}"
        ends = rows["offset"] + rows["size"]
        if len(rows) != shard.samples or min(rows["offset"].min(), rows["size"].min()) < 0 or ends.max() > len(tar):
            raise UserError(
                f"{uri} has {len(tar)} bytes, {shard.samples} samples by the index and {len(rows)} up to byte "
                f"{ends.max()} by its sidecar: these are of different data sets; shard the data set again"
            )
        return OpenShard(uri, tar, rows)

    def _array(self, name: str, data: bytes | memoryview) -> NDArray[Any]:
        try:
            return parse_array(data)
        except ValueError as error:
            raise UserError(f"{self.store.uri}/{name} is no array that this version reads: {error}") from error


def open_sources(data: Data) -> list[DataSplit]:
    """Splits to train on: that of `data.uri`, or those of the mixture."""
    named = [(source.uri, source.split) for source in data.mixture.values()] or [(data.uri, data.train_split)]
    stores = [(Store(uri, 60 * data.deadline_minutes), name) for uri, name in named]
    return [DataSplit(store, read_index(store), name) for store, name in stores]


def plan_split(split: DataSplit, *, batch_size: int, partitions: int, window: int | None, seed: int) -> SamplePlan:
    """Plan one split; without a window, as many samples as a mean shard has are shuffled together, at most 4096."""
    mean = max(1, split.samples // len(split.rows.shards))
    try:
        return SamplePlan(split.shard_samples, batch_size, partitions, window or min(_WINDOW, mean), seed)
    except UserError as error:
        raise UserError(f"{split.store.uri}, split {split.name!r}: {error}") from None


def make_plan(sources: Sequence[DataSplit], data: Data, seed: int) -> Plan:
    """Plan the samples to train on: of one split, or of the sources of a mixture."""
    partitions = canonical_partitions(data.partitions, data.batch_size)
    if not data.mixture:
        return plan_split(sources[0], batch_size=data.batch_size, partitions=partitions, window=data.window, seed=seed)
    assert data.steps_per_epoch is not None, "checked by the config"
    plans = tuple(
        plan_split(split, batch_size=partitions, partitions=partitions, window=data.window, seed=key(seed, number))
        for number, split in enumerate(sources)
    )
    weights = tuple(source.weight for source in data.mixture.values())
    return MixturePlan(plans, weights, data.batch_size, data.steps_per_epoch)


def shards_of(sources: Sequence[DataSplit]) -> list[tuple[DataSplit, Shard]]:
    """Shards of the sources one after the other, in the order of their plan."""
    return [(split, shard) for split in sources for shard in split.rows.shards]


def remote_bytes(sources: Sequence[DataSplit]) -> NDArray[np.int64]:
    """Bytes that each shard takes in a cache: none where it is mapped in place."""
    return np.array([shard.bytes * (split.store.local_path is None) for split, shard in shards_of(sources)])


def whole_side(sources: Sequence[DataSplit], image_size: int) -> int | None:
    """Side of the stored squares if crops can be cut from whole batches of them on the device, else None.

    Such crops are not antialiased, so images much larger than a view are cut and scaled by the reader instead.
    """
    sides = {split.stored_side for split in sources}
    side = sides.pop() if len(sides) == 1 else None
    return side if side is not None and side <= 2 * image_size else None


def decode_side(split: DataSplit, image_size: int) -> int:
    """Side of the squares that images are decoded to: the stored one, or the view's and an eighth more."""
    return split.stored_side or round(image_size * 8 / 7)


def resolve_mode(split: DataSplit, data: Data) -> Literal["resident", "stream"]:
    """Decide `auto`: resident when whole images are small squares and the decoded split fits `data.resident_gb`."""
    if data.mode != "auto":
        return data.mode
    side = None if data.mixture else whole_side([split], data.image_size)
    return "resident" if side and split.samples * 3 * side**2 <= data.resident_gb * 1e9 else "stream"
