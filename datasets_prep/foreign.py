"""Indexes tars that somebody else wrote where they lie, so that this project's reader accepts them.

Each tar is read once, as a stream. Beside it goes its sidecar, at the root `labels.npy` and, last, `index.json`; the
tars stay as they are.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from datasets_prep.errors import UserError, refuse
from datasets_prep.images import VERBATIM, BadImage, Size, prepare
from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index, Shard, SizeQuantiles, Split
from datasets_prep.members import IMAGE_FIELDS, Entry, Stream, entries
from datasets_prep.shards import sidecar_name
from datasets_prep.sources.base import SPLITS, UNLABELLED, class_names, label_faults, split_of
from datasets_prep.tar import npy, sidecar_bytes

MARK = "incomplete.json"  # there while tars are being indexed, or after that was killed: sidecars beside it are ours
_SORTED_AT_LEAST = 0.05  # share of equal neighbours above chance that is worth a warning
_FIX = "mend the tars, leave them out, or write them anew with `tessera shard wds`"

Progress = Callable[[int, int, int], None]  # tars done, tars in all, bytes done


class Address(Protocol):
    """Where a data set lies: what is needed here of `service.data.store.Store`."""

    uri: str

    def get(self, name: str) -> bytes: ...  # noqa: D102
    def stream(self, name: str) -> Iterator[bytes]: ...  # noqa: D102
    def exists(self, name: str) -> bool: ...  # noqa: D102
    def put(self, name: str, data: bytes) -> None: ...  # noqa: D102
    def create(self, name: str, data: bytes) -> bool: ...  # noqa: D102
    def list(self, prefix: str = "") -> list[str]: ...  # noqa: D102
    def delete(self, name: str) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Indexed:
    """The index of foreign tars, and what a person should know of them."""

    index: Index
    warnings: list[str]


class _Tar(NamedTuple):
    """What one pass over a tar finds; without a shard if there are faults."""

    name: str
    shard: Shard | None
    keys: NDArray[np.bytes_]
    labels: NDArray[np.int32]
    sizes: list[Size]
    fields: Counter[str]
    faults: list[str]


def index_tars(
    store: Address,
    *,
    name: str | None = None,
    split: str | None = None,
    class_list: Path | None = None,
    workers: int = 4,
    write: bool = True,
    progress: Progress | None = None,
) -> Indexed:
    """Read all tars at an address and write their sidecars, labels and index beside them.

    Args:
        store: the address.
        name: of the data set; by default the address's last part.
        split: that all tars belong to; by default each tar's path tells (`val/0.tar`, `set-train-0.tar`).
        class_list: file with a class name a line, in label order; by default classes are numbers.
        workers: threads that read tars.
        write: whether to write anything.
        progress: called with (tars done, tars in all, bytes done).

    Raises:
        UserError: no tars, an index that is there already, files in the sidecars' places, an address that cannot be
            written to, or tars that cannot be used, by name.
    """
    tars = _claim(store, write)
    found: list[_Tar] = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            for tar in pool.map(partial(_read, store, write), tars):
                found.append(tar)
                if progress:
                    progress(len(found), len(tars), sum(each.shard.bytes for each in found if each.shard))
        splits = _by_split(found, split)
        indexed = _index(store, name, splits, class_list)
    except UserError:
        if write:
            with suppress(UserError):  # of a store that is down: then the mark stays, and the next run begins anew
                _withdraw(store, tars)
        raise
    if write:
        store.put(LABELS_NAME, _labels(splits))
        if not store.create(INDEX_NAME, indexed.index.to_json()):
            raise UserError(f"{store.uri} was given an {INDEX_NAME} meanwhile: check it with `tessera verify`")
        store.delete(MARK)
    return indexed


def _claim(store: Address, write: bool) -> list[str]:
    """Return the tars, after seeing that their sidecars can be written and are nobody else's files."""
    names = store.list()
    tars = [name for name in names if name.endswith(".tar")]
    if INDEX_NAME in names:
        raise UserError(
            f"{store.uri} has an {INDEX_NAME} already: check it with `tessera verify {store.uri}`, "
            "or delete it to index the tars anew"
        )
    if not tars:
        raise UserError(f"{store.uri} holds no .tar files: name the folder or prefix that does")
    taken = sorted({LABELS_NAME, *map(sidecar_name, tars)} & {*names})
    if taken and MARK not in names:
        raise UserError(
            f"{store.uri}/{taken[0]} and {len(taken) - 1} more files lie where sidecars go: move or delete them"
        )
    if write:
        try:
            store.put(MARK, b"{}\n")
        except UserError as error:
            raise UserError(
                f"sidecars go beside the tars, and {error}; or copy the tars to where you may write, "
                "or write them anew with `tessera shard wds`"
            ) from error
    return tars


def _withdraw(store: Address, tars: Sequence[str]) -> None:
    """Delete what was written, the mark last."""
    for name in [*map(sidecar_name, tars), LABELS_NAME, MARK]:
        store.delete(name)


def _read(store: Address, write: bool, name: str) -> _Tar:
    """Read a tar and, if nothing is wrong with it, write its sidecar."""
    stream = Stream(store.stream(name))
    good: list[Entry] = []
    sizes: list[Size] = []
    faults: list[str] = []
    for entry in entries(stream, lambda extension: extension == "cls" or extension in IMAGE_FIELDS):
        wrong = entry.faults or _image_faults(entry, sizes)
        faults += [f"{name}: {fault}" for fault in wrong]
        if not wrong:
            del entry.contents[entry.image]
            good.append(entry)
    if not good and not faults:
        faults.append(f"{name} holds no samples")
    labels = [UNLABELLED if (label := entry.label()) is None else label for entry in good]
    return _Tar(
        name,
        None if faults else _finish(store, write, name, good, stream),
        np.array([entry.key.encode() for entry in good], bytes),
        np.array(labels, np.int32),
        sizes,
        Counter(entry.image for entry in good),
        faults,
    )


def _finish(store: Address, write: bool, name: str, samples: list[Entry], stream: Stream) -> Shard:
    """Write the sidecar of a tar and return its row of the index."""
    labelled = all("cls" in entry.members for entry in samples)
    members = [[entry.members[field] for field in (entry.image, "cls")[: 1 + labelled]] for entry in samples]
    offsets, sizes = (
        np.array([[getattr(member, what) for member in row] for row in members], np.int64)
        for what in ("offset", "size")
    )
    rows = sidecar_bytes([entry.key for entry in samples], offsets, sizes)
    if write:
        store.put(sidecar_name(name), rows)
    size, sha256 = stream.finish()
    return Shard(
        name=name,
        samples=len(samples),
        bytes=size,
        sha256=sha256,
        sidecar_sha256=hashlib.sha256(rows).hexdigest(),
    )


def _image_faults(entry: Entry, sizes: list[Size]) -> list[str]:
    """Append the image's size, or say what is wrong with it."""
    try:
        sizes.append(prepare(entry.contents[entry.image], VERBATIM)[1])
    except BadImage as error:
        return [f"member {entry.members[entry.image].name!r}: {error}"]
    return []


def _by_split(found: Sequence[_Tar], split: str | None) -> dict[str, list[_Tar]]:
    splits: dict[str, list[_Tar]] = defaultdict(list)
    for tar in found:
        splits[split or split_of(tar.name)].append(tar)
    return dict(sorted(splits.items(), key=lambda item: (*SPLITS, item[0]).index(item[0])))


def _index(store: Address, name: str | None, splits: dict[str, list[_Tar]], class_list: Path | None) -> Indexed:
    tars = [tar for each in splits.values() for tar in each]
    refuse(store.uri, [fault for tar in tars for fault in tar.faults], _FIX)
    labels = {split: np.concatenate([tar.labels for tar in each]) for split, each in splits.items()}
    classes = class_names(class_list, max(int(each.max()) for each in labels.values()))
    faults = [fault for split in splits for fault in label_faults(split, labels[split].tolist(), len(classes))]
    faults += [fault for split, each in splits.items() for fault in _repeated_keys(split, each)]
    refuse(store.uri, faults, _FIX)
    sides = np.sort(np.array([size for tar in tars for size in tar.sizes]), axis=0)
    least, middle, most = ((int(row[0]), int(row[1])) for row in sides[[0, len(sides) // 2, -1]])
    index = Index(
        name=name or store.uri.rstrip("/").rpartition("/")[2],
        classes=classes,
        image_size=SizeQuantiles(min=least, median=middle, max=most),
        labels_sha256=hashlib.sha256(_labels(splits)).hexdigest(),
        splits={split: _split(each, labels[split]) for split, each in splits.items()},
    )
    return Indexed(index, [warning for split, each in splits.items() for warning in _order_warnings(split, each)])


def _split(tars: list[_Tar], labels: NDArray[np.int32]) -> Split:
    content = sum((tar.fields for tar in tars), Counter[str]()).most_common(1)[0][0]
    fields = (content,) if labels[0] == UNLABELLED else (content, "cls")
    return Split(fields=fields, shards=tuple(tar.shard for tar in tars if tar.shard))


def _labels(splits: dict[str, list[_Tar]]) -> bytes:
    return npy(np.concatenate([tar.labels for tars in splits.values() for tar in tars]).astype("<i4"))


def _repeated_keys(split: str, tars: list[_Tar]) -> list[str]:
    keys, counts = np.unique(np.concatenate([tar.keys for tar in tars]), return_counts=True)
    return [
        f"key {key.decode()!r} occurs {count} times in {split}"
        for key, count in zip(keys, counts, strict=True)
        if count > 1
    ]


def _order_warnings(split: str, tars: list[_Tar]) -> list[str]:
    """Warn of samples that lie beside others of their class more often than in random order."""
    labels = np.concatenate([tar.labels for tar in tars])
    pairs = sum(len(tar.labels) - 1 for tar in tars)
    if not pairs or labels[0] == UNLABELLED:
        return []
    equal = sum(int(np.count_nonzero(tar.labels[1:] == tar.labels[:-1])) for tar in tars) / pairs
    chance = float(np.square(np.bincount(labels) / len(labels)).sum())
    if equal - chance < max(_SORTED_AT_LEAST, 3 * (chance * (1 - chance) / pairs) ** 0.5):
        return []
    return [
        f"{split} is sorted by class: {equal:.0%} of neighbours share their class, {chance:.1%} would in random order. "
        "Training shuffles within a window of a few shards, so its batches would be of few classes: "
        "write the samples anew in random order with `tessera shard wds`"
    ]
