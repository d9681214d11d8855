"""Checks a data set against its index and finds every fault: bytes, sidecars, labels, keys, images, leftovers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets_prep.errors import UserError
from datasets_prep.foreign import Address
from datasets_prep.images import BadImage, ImagePolicy, prepare
from datasets_prep.index import LABELS_NAME, Index, Shard, parse_array, sidecar_dtype
from datasets_prep.members import IMAGE_FIELDS, Entry, Stream, entries
from datasets_prep.sources.base import UNLABELLED

Progress = Callable[[int, int, int], None]  # samples done, samples in all, bytes done
_FULL = ImagePolicy(check="full")


class Fault(NamedTuple):
    """What is wrong, and with which object."""

    uri: str
    what: str


class Report(NamedTuple):
    """What was checked, and every fault of it."""

    fingerprint: str
    samples: dict[str, int]
    bytes: int
    faults: list[Fault]


def verify(
    store: Address, index: Index, split: str | None = None, *, workers: int = 4, progress: Progress | None = None
) -> Report:
    """Read and decode everything that an index names.

    Args:
        store: root of the data set.
        index: of the data set.
        split: the only one to look at; by default all.
        workers: threads that read and decode shards.
        progress: called with (samples done, samples in all, bytes done) after each shard.

    Raises:
        UserError: no such split.
    """
    if split is not None and split not in index.splits:
        raise UserError(f"{store.uri} has no split {split!r}, it has: {', '.join(index.splits)}")
    labels, label_faults = _labels(store, index)
    checks = [each for each in _checks(store, index, labels) if split in (None, each.split)]
    faults = [*_leftovers(store, index), *label_faults]
    keys: dict[str, list[NDArray[np.bytes_]]] = {each.split: [] for each in checks}
    samples, size, total = 0, 0, sum(each.shard.samples for each in checks)
    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(_check_shard, each) for each in checks]):
            check, found, names = done.result()
            faults += found
            keys[check.split].append(names)
            samples, size = samples + check.shard.samples, size + check.shard.bytes
            if progress:
                progress(samples, total, size)
    faults += [fault for name, each in keys.items() for fault in _repeated_keys(f"{store.uri}/{name}", each)]
    counts = {name: index.splits[name].samples for name in keys}
    return Report(index.fingerprint, counts, size, sorted(faults))


class _Check(NamedTuple):
    """One shard and what the index says of it; `labels` (N,) or None where they cannot be read."""

    store: Address
    split: str
    shard: Shard
    fields: int
    labels: NDArray[np.int32] | None


def _checks(store: Address, index: Index, labels: NDArray[np.int32] | None) -> Iterator[_Check]:
    start = 0
    for name, split in index.splits.items():
        for shard in split.shards:
            rows = None if labels is None else labels[start : start + shard.samples]
            start += shard.samples
            yield _Check(store, name, shard, len(split.fields), rows)


def _labels(store: Address, index: Index) -> tuple[NDArray[np.int32] | None, list[Fault]]:
    """Return the labels of all splits, None where they cannot be used, and what is wrong with them."""
    uri, samples = f"{store.uri}/{LABELS_NAME}", sum(split.samples for split in index.splits.values())
    try:
        data = store.get(LABELS_NAME)
        labels = parse_array(data)
    except (UserError, ValueError) as error:
        return None, [Fault(uri, f"cannot be read as an array: {error}")]
    if labels.dtype != np.dtype("<i4") or labels.shape != (samples,):
        return None, [Fault(uri, f"holds {labels.dtype} of shape {labels.shape}, the index has {samples} samples")]
    differs = hashlib.sha256(data).hexdigest() != index.labels_sha256
    faults = [Fault(uri, "its checksum differs from the index")] if differs else []
    for name, split in index.splits.items():
        rows = labels[index.label_slice(name)]
        least, most = (0, len(index.classes) - 1) if "cls" in split.fields else (UNLABELLED, UNLABELLED)
        outside = np.flatnonzero((rows < least) | (rows > most)).tolist()
        faults += [Fault(uri, f"sample {at} of {name} has label {rows[at]}, not {least}…{most}") for at in outside]
    return labels, faults


def _leftovers(store: Address, index: Index) -> Iterator[Fault]:
    shards = [shard for split in index.splits.values() for shard in split.shards]
    known = {LABELS_NAME, *(shard.name for shard in shards), *(shard.sidecar for shard in shards)}
    for name in store.list():
        if name.startswith("incomplete"):
            yield Fault(f"{store.uri}/{name}", "is left of a writer that was killed, or one still writes here")
        elif name.endswith((".tar", ".npy")) and name not in known:
            yield Fault(f"{store.uri}/{name}", "is not in the index, yet a reader of all tars would find it")


def _repeated_keys(uri: str, keys: list[NDArray[np.bytes_]]) -> Iterator[Fault]:
    found, counts = np.unique(np.concatenate(keys), return_counts=True)
    for key, count in zip(found[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        yield Fault(uri, f"key {key.decode(errors='replace')!r} occurs {count} times")


def _check_shard(check: _Check) -> tuple[_Check, list[Fault], NDArray[np.bytes_]]:
    """Return a shard's faults and its keys."""
    shard, store = check.shard, check.store
    rows = _sidecar(check)
    faults = [Fault(f"{store.uri}/{shard.sidecar}", rows)] if isinstance(rows, str) else []
    keys: list[bytes] = []
    found: list[str] = []
    stream = Stream(store.stream(shard.name))
    try:
        for entry in entries(stream, lambda extension: extension == "cls" or extension in IMAGE_FIELDS):
            found += _entry_faults(check, entry, len(keys), None if isinstance(rows, str) else rows)
            if entry.members:
                keys.append(entry.key.encode())
        size, sha256 = stream.finish()
    except UserError as error:
        found.append(str(error))
    else:
        found += _whole_faults(shard, len(keys), size, sha256)
    return check, faults + [Fault(f"{store.uri}/{shard.name}", what) for what in found], np.array(keys, bytes)


def _sidecar(check: _Check) -> NDArray[np.void] | str:
    """Rows of a sidecar, or what is wrong with it."""
    shard = check.shard
    try:
        data = check.store.get(shard.sidecar)
        if hashlib.sha256(data).hexdigest() != shard.sidecar_sha256:
            return f"has {len(data)} bytes whose checksum differs from the index"
        rows = parse_array(data)
    except (UserError, ValueError) as error:
        return f"cannot be read as an array: {error}"
    if rows.dtype.names != ("key", "offset", "size") or rows.dtype != sidecar_dtype(
        rows.dtype["key"].itemsize, check.fields
    ):
        return f"holds {rows.dtype}, not key, offset and size of {check.fields} fields"
    return rows if len(rows) == shard.samples else f"has {len(rows)} rows, the index {shard.samples} samples"


def _whole_faults(shard: Shard, samples: int, size: int, sha256: str) -> list[str]:
    faults = [f"holds {samples} samples, the index says {shard.samples}"] if samples != shard.samples else []
    if size != shard.bytes:
        faults.append(f"has {size} bytes, the index says {shard.bytes}: it was truncated or replaced")
    elif sha256 != shard.sha256:
        faults.append("its checksum differs from the index: it was changed or replaced")
    return faults


def _entry_faults(check: _Check, entry: Entry, number: int, rows: NDArray[np.void] | None) -> list[str]:
    if entry.faults:
        return entry.faults
    faults = [] if rows is None or number >= len(rows) else _row_faults(check, entry, rows[number])
    try:
        prepare(entry.contents[entry.image], _FULL)
    except BadImage as error:
        faults.append(f"member {entry.members[entry.image].name!r} does not decode: {error}")
    if check.fields == 1 or check.labels is None or number >= len(check.labels):
        return faults
    label, expected = entry.label(), int(check.labels[number])
    if label is None:
        faults.append(f"sample {entry.key!r} has no label")
    elif label != expected:
        faults.append(f"sample {entry.key!r} has label {label} and in {LABELS_NAME} {expected}")
    return faults


def _row_faults(check: _Check, entry: Entry, row: np.void) -> list[str]:
    """Compare a sample with its row in the sidecar."""
    if row["key"] != entry.key.encode():
        return [f"sample {entry.key!r} stands as {row['key'].decode(errors='replace')!r} in the sidecar"]
    fields = (entry.image, "cls")[: check.fields]
    spans = zip(fields, row["offset"].tolist(), row["size"].tolist(), strict=True)
    moved = [field for field, *span in spans if field in entry.members and [*entry.members[field][1:3]] != span]
    return [f"sample {entry.key!r} lies elsewhere than its sidecar says ({', '.join(moved)})"] if moved else []
