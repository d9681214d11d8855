"""Writes a source as shards with an index, in one process, the index last.

Equal sources, seeds and sizes give equal bytes, whatever the machine.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from datasets_prep.errors import UserError
from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index, Shard, SizeQuantiles, Split, sidecar_dtype
from datasets_prep.permute import key, permutation, stratified
from datasets_prep.sources.base import UNLABELLED, Sample, Source

PENDING_NAME = "incomplete.json"  # there while a writer runs, or after it was killed: the shards beside it are ours
_SPLIT_ORDER = ("train", "val", "test", "unlabelled")
_OURS = re.compile(rf"[^/]+/shard-\d{{6}}\.(tar|npy)|{re.escape(LABELS_NAME)}")
_TAR_END = bytes(1024)
_VAL_STREAM = zlib.crc32(b"val cut")
_NO_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Sink(Protocol):
    """Where a data set goes: what the writer needs of `service.data.store.Store`."""

    uri: str

    def get(self, name: str) -> bytes: ...  # noqa: D102
    def exists(self, name: str) -> bool: ...  # noqa: D102
    def put(self, name: str, data: bytes | Path) -> None: ...  # noqa: D102
    def create(self, name: str, data: bytes) -> bool: ...  # noqa: D102
    def list(self, prefix: str = "") -> list[str]: ...  # noqa: D102
    def delete(self, name: str) -> None: ...  # noqa: D102


class Layout(NamedTuple):
    """How samples are laid out: seed of the order and of the validation cut, largest shard, share of `val`."""

    seed: int
    shard_mb: int
    val_share: float


Progress = Callable[[int, int], None]  # samples done, samples in all


def write_dataset(
    source: Source,
    sink: Sink,
    *,
    seed: int = 0,
    shard_mb: int = 64,
    val_share: float = 0.1,
    progress: Progress | None = None,
) -> Index:
    """Write all splits of `source`; where `sink` holds just that already, check so and write nothing.

    Args:
        source: what to write.
        sink: where to, a `Store`.
        seed: of the global order of each split and of the validation cut.
        shard_mb: most MiB of a shard, unless one sample is larger.
        val_share: share of `train` that becomes `val` where the source has no `val`.
        progress: called with (samples done, samples in all) after each sample.

    Raises:
        UserError: samples that are no images, nothing to write, or another data set at the address.
    """
    layout = Layout(seed, shard_mb, val_share)
    splits = arrange(source, layout)
    step = _Checker(sum(map(len, splits.values())), progress)
    existing = read_index(sink) if sink.exists(INDEX_NAME) else None
    if existing is not None:
        if _outline(existing.name, existing.classes, existing.splits) != _outline(source.name, source.classes, splits):
            raise _other_data(sink, existing)
        if _write_splits(source, splits, _put_nowhere, layout, step) != existing:
            raise _other_data(sink, existing)
        return existing
    _claim(sink)
    index = _write_splits(source, splits, sink.put, layout, step)
    _remove_leftovers(sink, index)
    if not sink.create(INDEX_NAME, index.to_json()) and (first := read_index(sink)) != index:
        raise _other_data(sink, first)
    sink.delete(PENDING_NAME)
    return index


def arrange(source: Source, layout: Layout) -> dict[str, list[Sample]]:
    """Cut `val` from `train` where the source has none, and put each split into its seeded global order."""
    if layout.shard_mb < 1:
        raise UserError(f"shard_mb={layout.shard_mb} must be at least 1: choose 64 or so")
    empty = [name for name, samples in source.splits.items() if not samples]
    if empty or not source.splits:
        raise UserError(f"{source.name}: no images in {', '.join(empty) or 'any split'}: nothing to write")
    splits = dict(source.splits)
    if "val" not in splits and "train" in splits:
        splits["train"], splits["val"] = _cut(source.name, splits["train"], layout)
    ordered: dict[str, list[Sample]] = {}
    for name in sorted(splits, key=lambda split: (*_SPLIT_ORDER, split).index(split)):
        samples = splits[name]
        order = permutation(key(layout.seed, zlib.crc32(name.encode())), len(samples))
        ordered[name] = [samples[position] for position in order]
    return ordered


def _cut(name: str, train: list[Sample], layout: Layout) -> tuple[list[Sample], list[Sample]]:
    count = round(layout.val_share * len(train))
    if not 0 < count < len(train):
        raise UserError(
            f"{name}: val_share={layout.val_share} of {len(train)} train images leaves one of train and val empty: "
            "choose a share between 0 and 1 that gives each at least one, or bring a val split"
        )
    chosen = stratified(key(layout.seed, _VAL_STREAM), np.array([sample.label for sample in train]), count)
    pairs = list(zip(train, chosen, strict=True))
    return [sample for sample, val in pairs if not val], [sample for sample, val in pairs if val]


def read_index(sink: Sink) -> Index:
    """Return the index at an address.

    Raises:
        UserError: it cannot be read as one.
    """
    try:
        return Index.model_validate_json(sink.get(INDEX_NAME))
    except ValidationError as error:
        raise UserError(
            f"{sink.uri}/{INDEX_NAME} is no data set index of this version "
            f"({error.error_count()} errors): shard the data again, elsewhere or after deleting it"
        ) from error


def _outline(name: str, classes: tuple[str, ...], splits: dict[str, Any]) -> tuple[Any, ...]:
    """What tells most data sets apart without reading an image."""
    sizes = {split: rows.samples if isinstance(rows, Split) else len(rows) for split, rows in splits.items()}
    return name, classes, sizes


def _other_data(sink: Sink, existing: Index) -> UserError:
    samples = sum(split.samples for split in existing.splits.values())
    return UserError(
        f"{sink.uri} already holds a different data set ({existing.name}, {samples} samples, fingerprint "
        f"{existing.fingerprint}; other images, seed, shard size or validation share): "
        "choose another --out or delete it"
    )


def _claim(sink: Sink) -> None:
    """Mark the address as being written; shards without our mark and without an index are somebody else's."""
    present = sink.list()
    foreign = [name for name in present if _OURS.fullmatch(name)]
    if foreign and PENDING_NAME not in present:
        raise UserError(
            f"{sink.uri} holds {len(foreign)} files like {foreign[0]} without {INDEX_NAME}, not left by this writer: "
            "choose another --out or delete them"
        )
    sink.put(PENDING_NAME, b"{}\n")


def _remove_leftovers(sink: Sink, index: Index) -> None:
    """Delete what a killed writer with another layout left, so that a reader of `shard-*` finds this data only."""
    shards = [shard for split in index.splits.values() for shard in split.shards]
    written = {LABELS_NAME, *(shard.name for shard in shards), *(shard.sidecar for shard in shards)}
    for name in sink.list():
        if _OURS.fullmatch(name) and name not in written:
            sink.delete(name)


def _put_nowhere(name: str, data: bytes) -> None:
    """Stand in for a sink's `put` when only the checksums are wanted."""


def _write_splits(
    source: Source, splits: dict[str, list[Sample]], put: Callable[[str, bytes], None], layout: Layout, step: _Checker
) -> Index:
    rows = {name: _write_split(name, samples, put, layout, step) for name, samples in splits.items()}
    step.refuse_bad(source.name)
    labels = _npy(np.array([sample.label for samples in splits.values() for sample in samples], "<i4"))
    put(LABELS_NAME, labels)
    return Index(
        name=source.name,
        classes=source.classes,
        image_size=step.quantiles(),
        labels_sha256=hashlib.sha256(labels).hexdigest(),
        splits={name: Split(fields=_fields(splits[name]), shards=tuple(shards)) for name, shards in rows.items()},
    )


def _write_split(
    split: str, samples: list[Sample], put: Callable[[str, bytes], None], layout: Layout, step: _Checker
) -> list[Shard]:
    fields = _fields(samples)
    shards: list[Shard] = []
    tar = _Tar(fields)
    for sample in samples:
        image = step.load(split, sample)
        if image is None:
            continue
        contents = (image, str(sample.label).encode())[: len(fields)]
        if tar.keys and tar.size_with(contents) > layout.shard_mb << 20:
            shards.append(_put_shard(f"{split}/shard-{len(shards):06d}.tar", tar, put))
            tar = _Tar(fields)
        tar.add(sample.key, contents)
    return [*shards, _put_shard(f"{split}/shard-{len(shards):06d}.tar", tar, put)] if not step.bad else []


def _fields(samples: list[Sample]) -> tuple[str, ...]:
    """The content's extension, the split's most common one, then `cls` where there are labels.

    One name for all contents keeps sidecars rectangular; every image reader tells PNG from JPEG by its first bytes.
    """
    extension = Counter(sample.extension for sample in samples).most_common(1)[0][0]
    return (extension,) if samples[0].label == UNLABELLED else (extension, "cls")


def _put_shard(name: str, tar: _Tar, put: Callable[[str, bytes], None]) -> Shard:
    data, sidecar = tar.content(), tar.sidecar()
    shard = Shard(
        name=name,
        samples=len(tar.keys),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
    )
    put(shard.name, data)
    put(shard.sidecar, sidecar)
    return shard


class _Checker:
    """Loads samples, decodes each to see that it is an image, and keeps sizes and failures."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done = total, progress, 0
        self._sizes: list[tuple[int, int]] = []
        self.bad: list[str] = []

    def load(self, split: str, sample: Sample) -> bytes | None:
        """Return the image's bytes, or None when it, or one before it, is bad: then all are checked, none is kept."""
        try:
            data = sample.load()
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                image.load()
                self._sizes.append(image.size)
        except _NO_IMAGE:
            self.bad.append(f"{split}/{sample.key}.{sample.extension}")
            data = b""
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)
        return None if self.bad else data

    def refuse_bad(self, name: str) -> None:
        if self.bad:
            raise UserError(
                f"{name}: {len(self.bad)} of {self._total} samples are not whole PNG or JPEG images "
                f"({', '.join(self.bad[:5])}): repair or remove them"
            )

    def quantiles(self) -> SizeQuantiles:
        sides = np.sort(np.array(self._sizes), axis=0)
        least, middle, most = ((int(row[0]), int(row[1])) for row in sides[[0, len(sides) // 2, -1]])
        return SizeQuantiles(min=least, median=middle, max=most)


class _Tar:
    """A USTAR archive in memory with nothing in it that depends on the time, the user or the machine."""

    def __init__(self, fields: tuple[str, ...]):
        self._fields = fields
        self._chunks: list[bytes] = []
        self._bytes = 0
        self._spans: list[tuple[int, int]] = []
        self.keys: list[bytes] = []

    def size_with(self, contents: tuple[bytes, ...]) -> int:
        """Bytes of the finished archive if one more sample is added."""
        return self._bytes + tar_bytes(map(len, contents)) + len(_TAR_END)

    def add(self, sample_key: str, contents: tuple[bytes, ...]) -> None:
        for field, content in zip(self._fields, contents, strict=True):
            header = _header(f"{sample_key}.{field}", len(content))
            self._spans.append((self._bytes + len(header), len(content)))
            self._chunks += [header, content, bytes(-len(content) % 512)]
            self._bytes += tar_bytes([len(content)])
        self.keys.append(sample_key.encode(errors="surrogateescape"))

    def content(self) -> bytes:
        return b"".join([*self._chunks, _TAR_END])

    def sidecar(self) -> bytes:
        rows = np.empty(len(self.keys), sidecar_dtype(max(map(len, self.keys)), len(self._fields)))
        spans = np.array(self._spans).reshape(len(self.keys), len(self._fields), 2)
        rows["key"], rows["offset"], rows["size"] = self.keys, spans[..., 0], spans[..., 1]
        return _npy(rows)


def tar_bytes(sizes: Any) -> int:
    """Bytes that files of these sizes take in a tar: a header of 512 each, contents padded to 512."""
    return sum(512 + size + -size % 512 for size in sizes)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError as error:
        raise UserError(
            f"{name}: {error} for a tar (100 bytes, 155 more for folders): shorten the file name"
        ) from error


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
