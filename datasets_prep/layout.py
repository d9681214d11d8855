"""Which sample lies in which shard: a pure function of a source and a layout, known before any shard is written."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from datasets_prep.errors import UserError
from datasets_prep.images import ImagePolicy, prepare
from datasets_prep.permute import key, permutation, stratified
from datasets_prep.sources.base import UNLABELLED, Sample, Source
from datasets_prep.tar import encode_name, split_name, tar_bytes

_SPLIT_ORDER = ("train", "val", "test", "unlabelled")
_VAL_STREAM = zlib.crc32(b"val cut")
_PROBED = 128  # images of a split whose sizes tell how many go into a shard
_KEY = re.compile(r"(?:(?!\.\.?/)[^/\0]+/)*[^/.\0]+")
_SHORT_NAME = 90  # bytes of a key that fits any header, whatever the field


class Layout(NamedTuple):
    """How samples are laid out.

    Args:
        seed: of the global order of each split and of the validation cut.
        shard_mb: MiB of a shard, about: shards of a split have equal counts, from the mean size of its first images.
        val_share: share of `train` that becomes `val` where the source has no `val`.
    """

    seed: int = 0
    shard_mb: int = 64
    val_share: float = 0.1


class Task(NamedTuple):
    """One shard to write: the name of its tar, its fields, its samples in order."""

    name: str
    fields: tuple[str, ...]
    samples: list[Sample]


@dataclass(frozen=True)
class SplitPlan:
    """A split in its final order.

    Args:
        name: of the split.
        samples: all of them, permuted.
        fields: the content's extension, the split's most common one, then `cls` where there are labels. One name for
            all contents keeps sidecars rectangular; every image reader tells PNG from JPEG by its first bytes.
        expected_bytes: of its tars, from a probe.
        shards: how many.
    """

    name: str
    samples: list[Sample]
    fields: tuple[str, ...]
    expected_bytes: int
    shards: int

    def tasks(self) -> Iterator[Task]:
        """Cut the samples into shards whose counts differ by one at most."""
        bounds = [number * len(self.samples) // self.shards for number in range(self.shards + 1)]
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            yield Task(f"{self.name}/shard-{number:06d}.tar", self.fields, self.samples[start:stop])


@dataclass(frozen=True)
class Plan:
    """Everything that decides a data set's bytes, but the images' own."""

    source: str
    classes: tuple[str, ...]
    layout: Layout
    images: ImagePolicy
    splits: tuple[SplitPlan, ...]

    @property
    def samples(self) -> int:
        """Samples of all splits."""
        return sum(len(split.samples) for split in self.splits)

    @property
    def expected_bytes(self) -> int:
        """Bytes of all tars, about."""
        return sum(split.expected_bytes for split in self.splits)

    @cached_property
    def tasks(self) -> list[Task]:
        """All shards in index order."""
        return [task for split in self.splits for task in split.tasks()]

    @cached_property
    def digest(self) -> str:
        """16 hex digits: equal plans over equal images write equal bytes."""
        state = hashlib.sha256(
            repr((self.source, self.classes, self.layout, self.images, self.images.encoder)).encode()
        )
        for split in self.splits:
            state.update(repr((split.name, split.fields, split.shards)).encode())
            for sample in split.samples:
                state.update(encode_name(f"{sample.key}\0{sample.extension}\0{sample.label}\0"))
        return state.hexdigest()[:16]


def lay_out(source: Source, layout: Layout, images: ImagePolicy) -> Plan:
    """Arrange all splits and decide their shards, from the sizes of a few images of each.

    Raises:
        UserError: nothing to write, an impossible validation share, keys that no tar can hold.
    """
    splits = [_plan(name, samples, layout, images) for name, samples in _arranged(source, layout).items()]
    return Plan(source.name, source.classes, layout, images, tuple(splits))


def _plan(name: str, samples: list[Sample], layout: Layout, images: ImagePolicy) -> SplitPlan:
    extension = Counter(sample.extension for sample in samples).most_common(1)[0][0]
    fields = (extension,) if samples[0].label == UNLABELLED else (extension, "cls")
    _refuse_keys(name, samples, fields)
    expected = _expected_bytes(samples, fields, images)
    shards = min(len(samples), max(1, -(-expected // (layout.shard_mb << 20))))
    return SplitPlan(name, samples, fields, expected, shards)


def _refuse_keys(split: str, samples: list[Sample], fields: tuple[str, ...]) -> None:
    for sample in samples:
        if not _KEY.fullmatch(sample.key):
            raise UserError(
                f"{split}: key {sample.key!r} must be a relative path without '..' and without dots in its last part: "
                "rename the image"
            )
        if len(encoded := encode_name(sample.key)) > _SHORT_NAME:
            for name in (encoded + b"." + field.encode() for field in fields):
                if len(name) > 100:
                    split_name(name)


def _expected_bytes(samples: list[Sample], fields: tuple[str, ...], images: ImagePolicy) -> int:
    probed = [size for sample in samples[:_PROBED] if (size := _stored_bytes(sample, images))]  # in random order
    label = [1] * (len(fields) - 1)
    return sum(tar_bytes([size, *label]) for size in probed) * len(samples) // max(1, len(probed))


def _stored_bytes(sample: Sample, images: ImagePolicy) -> int:
    try:
        return len(prepare(sample.load(), images._replace(check="header"))[0])
    except (OSError, ValueError):  # the writer reports it
        return 0


def _arranged(source: Source, layout: Layout) -> dict[str, list[Sample]]:
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
