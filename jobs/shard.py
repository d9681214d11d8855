"""`tessera shard`: from a named source to shards at an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets_prep.errors import UserError
from datasets_prep.index import INDEX_NAME, Index
from datasets_prep.sources import open_source
from datasets_prep.sources.base import NO_OPTIONS, UNLABELLED, Options, Sample, Source
from datasets_prep.writer import Layout, Progress, arrange, tar_bytes, write_dataset
from service.data.store import Store

_PROBED = 64  # images of a split whose sizes an estimate looks at


class Estimate(NamedTuple):
    """What sharding would write: samples a split, bytes and shards in all, and whether an index is there already."""

    name: str
    samples: dict[str, int]
    classes: int
    bytes: int
    shards: int
    occupied: bool


def shard(
    source_name: str,
    out_uri: str,
    source_path: Path | None = None,
    *,
    options: Options = NO_OPTIONS,
    seed: int = 0,
    shard_mb: int = 64,
    val_share: float = 0.1,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Index:
    """Write a source (a key of `SOURCES`) to `out_uri`, or say that the same data set is there already."""
    sink = Store(out_uri)
    there = sink.exists(INDEX_NAME)  # asked first: wrong keys show before a source is read
    source = _open(source_name, source_path, options)
    index = write_dataset(source, sink, seed=seed, shard_mb=shard_mb, val_share=val_share, progress=progress)
    if there:
        say(f"{sink.uri} already holds this data set, fingerprint {index.fingerprint}: nothing written")
    return index


def estimate(
    source_name: str,
    out_uri: str,
    source_path: Path | None = None,
    *,
    options: Options = NO_OPTIONS,
    seed: int = 0,
    shard_mb: int = 64,
    val_share: float = 0.1,
) -> Estimate:
    """Say what `shard` would write, from the sizes of a few images of each split; nothing is written."""
    occupied = Store(out_uri).exists(INDEX_NAME)
    source = _open(source_name, source_path, options)
    splits = arrange(source, Layout(seed, shard_mb, val_share))
    sizes = {name: _expected_bytes(samples) for name, samples in splits.items()}
    return Estimate(
        name=source.name,
        samples={name: len(samples) for name, samples in splits.items()},
        classes=len(source.classes),
        bytes=sum(sizes.values()),
        shards=sum(-(-size // (shard_mb << 20)) for size in sizes.values()),
        occupied=occupied,
    )


def _expected_bytes(samples: list[Sample]) -> int:
    probed = samples[:_PROBED]  # the order is random already
    label = [] if samples[0].label == UNLABELLED else [1]
    return sum(tar_bytes([len(sample.load()), *label]) for sample in probed) * len(samples) // len(probed)


def _open(name: str, path: Path | None, options: Options) -> Source:
    if name == "cifar10" and path is None:
        path = _download_cifar10()
    return open_source(name, path, options)


def _download_cifar10() -> Path:
    """Fetch the original batches by torchvision, once, into the user's cache folder."""
    from torchvision.datasets import CIFAR10

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera" / "cifar10"
    try:
        CIFAR10(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded to {root} ({error}): name a folder that has it with --source"
        ) from error
    return root
