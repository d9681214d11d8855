"""`tessera shard`: from a named source to shards at an address."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets_prep.errors import UserError
from datasets_prep.images import VERBATIM, ImagePolicy
from datasets_prep.index import INDEX_NAME, Index
from datasets_prep.layout import Layout, SplitPlan, lay_out
from datasets_prep.shards import Job, ShardWriter, Task
from datasets_prep.sources import open_source
from datasets_prep.sources.base import NO_OPTIONS, Options, Source
from datasets_prep.writer import OnError, Progress, write_dataset
from service.data.store import Store

_PROBED = 128  # images of a split whose time an estimate takes


class Estimate(NamedTuple):
    """What sharding would write.

    `samples` a split, `bytes` and `shards` in all, `seconds` of work without the store's own time, and whether an
    index is there already.
    """

    name: str
    samples: dict[str, int]
    classes: int
    bytes: int
    shards: int
    seconds: float
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
    images: ImagePolicy = VERBATIM,
    on_error: OnError = "refuse",
    workers: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Index:
    """Write a source (a key of `SOURCES`) to `out_uri`, or say that the same data set is there already."""
    sink = Store(out_uri)
    there = sink.exists(INDEX_NAME)  # asked first: wrong keys show before a source is read
    index = write_dataset(
        _open(source_name, source_path, options),
        sink,
        seed=seed,
        shard_mb=shard_mb,
        val_share=val_share,
        images=images,
        on_error=on_error,
        workers=workers,
        progress=progress,
        say=say,
    )
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
    images: ImagePolicy = VERBATIM,
    workers: int = 1,
) -> Estimate:
    """Say what `shard` would write, from a few images of each split; nothing is written."""
    occupied = Store(out_uri).exists(INDEX_NAME)
    plan = lay_out(_open(source_name, source_path, options), Layout(seed, shard_mb, val_share), images)
    return Estimate(
        name=plan.source,
        samples={split.name: len(split.samples) for split in plan.splits},
        classes=len(plan.classes),
        bytes=plan.expected_bytes,
        shards=len(plan.tasks),
        seconds=sum(_seconds(split, images) for split in plan.splits) / workers,
        occupied=occupied,
    )


def _seconds(split: SplitPlan, images: ImagePolicy) -> float:
    """Time to read, check and lay out all of a split, from its first images."""
    probed = split.samples[:_PROBED]
    writer = ShardWriter(Job(sink=None, records="", images=images, skip=True), advance=lambda samples, size: None)
    start = time.perf_counter()
    writer.begin(Task("probe.tar", split.fields, probed)).result()
    return (time.perf_counter() - start) / len(probed) * len(split.samples)


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
