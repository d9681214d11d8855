"""Writes single shards, in this process or in several, each its tar, its sidecar and a record of both."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from datasets_prep.errors import UserError
from datasets_prep.images import ImagePolicy, Size, prepare
from datasets_prep.layout import Task
from datasets_prep.sources.base import Sample
from datasets_prep.tar import BLOCK, buffer_blocks, pack

_READERS = 4  # threads of a process that wait for files
_CHUNK = 32  # samples that a thread takes at once

Loaded = tuple[bytes, Size] | str  # an image as it is stored and its (width, height), or why it is none
Advance = Callable[[int, int], None]  # samples and bytes since the last call


class Sink(Protocol):
    """Where a data set goes: what the writer needs of `service.data.store.Store`."""

    uri: str

    def get(self, name: str) -> bytes: ...  # noqa: D102
    def exists(self, name: str) -> bool: ...  # noqa: D102
    def put(self, name: str, data: bytes | memoryview | Path) -> None: ...  # noqa: D102
    def create(self, name: str, data: bytes) -> bool: ...  # noqa: D102
    def sizes(self, prefix: str = "") -> dict[str, int]: ...  # noqa: D102
    def delete(self, name: str) -> None: ...  # noqa: D102
    def sweep(self) -> None: ...  # noqa: D102


class Written(NamedTuple):
    """What the index needs to know of a shard.

    Args:
        samples: kept.
        bytes: of the tar; 0 where no sample was kept, and there is no tar.
        sha256: of the tar.
        sidecar_bytes: of the sidecar.
        sidecar_sha256: of the sidecar.
        sizes: rows of (width, height, count) of the images.
        bad: position in the task and reason of each image that is none.
    """

    samples: int
    bytes: int
    sha256: str
    sidecar_bytes: int
    sidecar_sha256: str
    sizes: list[tuple[int, int, int]]
    bad: list[tuple[int, str]]


class Job(NamedTuple):
    """What all shards of a data set have in common.

    Args:
        sink: where shards go; None only takes their checksums.
        records: prefix of the records of finished shards.
        images: policy for images.
        skip: whether shards are written without their bad images, or not at all.
    """

    sink: Sink | None
    records: str
    images: ImagePolicy
    skip: bool


def sidecar_name(tar: str) -> str:
    """Name of the sidecar beside a tar."""
    return tar.removesuffix(".tar") + ".npy"


def record_name(records: str, tar: str) -> str:
    """Name of a finished shard's record."""
    return f"{records}/{tar.removesuffix('.tar')}.json"


class ShardWriter:
    """Writes one shard after the other through one buffer.

    Args:
        job: what to do with them.
        advance: called while images are loaded; what it raises ends the shard.
    """

    def __init__(self, job: Job, advance: Advance):
        self._job, self._advance = job, advance
        self._readers = ThreadPoolExecutor(_READERS, "read")
        self._buffer = np.empty((0, BLOCK), np.uint8)

    def close(self) -> None:
        """Forget what is still to be read."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def write(self, task: Task, check_only: bool = False) -> Written:
        """Load, check, lay out and store a shard, its record last; with `check_only`, only name its bad images."""
        loaded = list(self._load(task.samples))
        bad = [(position, each) for position, each in enumerate(loaded) if isinstance(each, str)]
        kept = [(position, each) for position, each in enumerate(loaded) if not isinstance(each, str)]
        written = Written(len(kept), 0, "", 0, "", _counted(size for _, (_, size) in kept), bad)
        if check_only or (bad and not self._job.skip):
            return written
        if kept:
            written = self._store(task, [(task.samples[at], data) for at, (data, _) in kept], written)
        if self._job.sink is not None:
            record = json.dumps(written._asdict()).encode()
            self._job.sink.put(record_name(self._job.records, task.name), record)
        return written

    def _load(self, samples: list[Sample]) -> Iterator[Loaded]:
        chunks = [samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
        for chunk in self._readers.map(partial(_loaded, self._job.images), chunks):
            self._advance(len(chunk), sum(len(each[0]) for each in chunk if not isinstance(each, str)))
            yield from chunk

    def _store(self, task: Task, images: list[tuple[Sample, bytes]], written: Written) -> Written:
        contents = [(data, b"%d" % sample.label)[: len(task.fields)] for sample, data in images]
        if (blocks := buffer_blocks(contents)) > len(self._buffer):
            self._buffer = np.empty((blocks, BLOCK), np.uint8)
        packed = pack([sample.key for sample, _ in images], task.fields, contents, self._buffer)
        if self._job.sink is not None:
            self._job.sink.put(task.name, packed.tar)
            self._job.sink.put(sidecar_name(task.name), packed.sidecar)
        return written._replace(
            bytes=len(packed.tar),
            sha256=hashlib.sha256(packed.tar).hexdigest(),
            sidecar_bytes=len(packed.sidecar),
            sidecar_sha256=hashlib.sha256(packed.sidecar).hexdigest(),
        )


def _loaded(images: ImagePolicy, samples: list[Sample]) -> list[Loaded]:
    loaded: list[Loaded] = []
    for sample in samples:
        try:
            loaded.append(prepare(sample.load(), images))
        except (OSError, ValueError) as error:
            loaded.append(str(error))
    return loaded


def _counted(sizes: Iterable[Size]) -> list[tuple[int, int, int]]:
    return [(*size, count) for size, count in sorted(Counter(sizes).items())]


def write_shards(tasks: list[Task], job: Job, workers: int, advance: Advance) -> Generator[tuple[Task, Written]]:
    """Write shards and yield each when it is finished, in any order.

    Without `job.skip`, once an image is bad the remaining shards are only checked.

    Raises:
        UserError: the store failed, or a process died.
    """
    if workers == 1 or len(tasks) == 1:
        yield from _write_here(tasks, job, advance)
    elif tasks:
        yield from _write_in_processes(tasks, job, min(workers, len(tasks)), advance)


def _write_here(tasks: list[Task], job: Job, advance: Advance) -> Generator[tuple[Task, Written]]:
    writer, check_only = ShardWriter(job, advance), False
    try:
        for task in tasks:
            written = writer.write(task, check_only)
            check_only = check_only or (bool(written.bad) and not job.skip)
            yield task, written
    finally:
        writer.close()


def _write_in_processes(tasks: list[Task], job: Job, workers: int, advance: Advance) -> Generator[tuple[Task, Written]]:
    context = multiprocessing.get_context("spawn")  # a forked child cannot use its parent's store
    counters = context.RawArray("q", 3)  # without a lock, which a killed process might keep: they are for display
    pool = ProcessPoolExecutor(workers, context, _begin, (job, counters))
    waiting, running, check_only = iter(tasks), dict[Future[Written], Task](), False
    reported = (0, 0)
    try:
        while True:
            while len(running) <= workers and (task := next(waiting, None)):
                running[pool.submit(_write, task, check_only)] = task
            if not running:
                return
            finished, _ = wait(running, 0.2, FIRST_COMPLETED)
            now = counters[_SAMPLES], counters[_BYTES]
            advance(now[0] - reported[0], now[1] - reported[1])
            reported = now
            for future in finished:
                written = future.result()
                check_only = check_only or (bool(written.bad) and not job.skip)
                yield running.pop(future), written
    except BrokenProcessPool as error:
        raise UserError(
            "a process that writes shards died, perhaps for lack of memory: "
            "run the same command again with fewer --workers; finished shards are kept"
        ) from error
    finally:
        counters[_STOP] = 1
        pool.shutdown(cancel_futures=True)


_SAMPLES, _BYTES, _STOP = range(3)
_writer: ShardWriter | None = None


class _Stopped(Exception):
    """The parent wants no more shards."""


def _begin(job: Job, counters: Any) -> None:
    """Set up a process of the pool: it leaves Ctrl-C to its parent and ends when the parent is gone."""
    global _writer

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def advance(samples: int, size: int) -> None:
        if counters[_STOP]:
            raise _Stopped
        counters[_SAMPLES] += samples
        counters[_BYTES] += size

    _writer = ShardWriter(job, advance)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(task: Task, check_only: bool) -> Written:
    assert _writer is not None
    return _writer.write(task, check_only)
