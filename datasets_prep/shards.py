"""Writes single shards, in this process or in several, each its tar, its sidecar and a record of both."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datasets_prep.errors import UserError
from datasets_prep.images import BadImage, ImagePolicy, Size, prepare
from datasets_prep.layout import Task
from datasets_prep.sources.base import Sample
from datasets_prep.tar import TarBuilder

_READERS = 4  # threads of a process that wait for files
_CHUNK = 16  # samples that are read at once
_SLOW = 0.5e-3  # seconds a file from which on threads are worth their switches

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


NOTHING = Written(0, 0, "", 0, "", [], [])


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
    """Writes one shard after the other, storing one while it loads the next.

    Args:
        job: what to do with them.
        advance: called while images are loaded; what it raises ends the shard.
    """

    def __init__(self, job: Job, advance: Advance):
        self._job, self._advance = job, advance
        self._threads = ThreadPoolExecutor(_READERS + 2)  # and one that stores, one that hashes
        self._tars = TarBuilder(), TarBuilder()
        self._storing: Future[Written] = _done(NOTHING)
        self._slow = False

    def close(self) -> None:
        """Finish what is being stored, forget what is still to be read."""
        wait([self._storing])
        self._threads.shutdown(cancel_futures=True)

    def begin(self, task: Task, check_only: bool = False) -> Future[Written]:
        """Load, check and lay out a shard, then store it in the background, its record last.

        With `check_only`, and where images are bad and not to be skipped, nothing is stored.
        """
        self._tars = self._tars[::-1]
        written = self._load(task, self._tars[0])
        wait([self._storing])  # one at a time, so that the other buffer is free when this returns
        stores = not check_only and (self._job.skip or not written.bad)
        self._storing = self._threads.submit(self._store, task, self._tars[0], written) if stores else _done(written)
        return self._storing

    def _load(self, task: Task, tar: TarBuilder) -> Written:
        tar.clear()
        bad: list[tuple[int, str]] = []
        sizes: Counter[Size] = Counter()
        for position, (sample, content) in enumerate(zip(task.samples, self._contents(task.samples), strict=True)):
            try:
                data, size = _prepared(content, self._job.images)
            except BadImage as error:
                bad.append((position, str(error)))
                continue
            sizes[size] += 1
            tar.add(sample.key, (data, b"%d" % sample.label)[: len(task.fields)])
        kept = len(task.samples) - len(bad)
        return NOTHING._replace(samples=kept, sizes=[(*size, count) for size, count in sorted(sizes.items())], bad=bad)

    def _contents(self, samples: list[Sample]) -> Iterator[bytes | Exception]:
        """What each sample's file holds, or why it cannot be read; threads read ahead once files come slowly."""
        chunks = deque(samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK))
        ahead: deque[Future[list[bytes | Exception]]] = deque()
        while chunks or ahead:
            if self._slow:
                while chunks and len(ahead) < _READERS:
                    ahead.append(self._threads.submit(_read, chunks.popleft()))
            start = time.perf_counter()
            chunk = ahead.popleft().result() if ahead else _read(chunks.popleft())
            self._slow = self._slow or time.perf_counter() - start > _SLOW * len(chunk)
            yield from chunk
            self._advance(len(chunk), sum(len(each) for each in chunk if isinstance(each, bytes)))

    def _store(self, task: Task, builder: TarBuilder, written: Written) -> Written:
        put = _put_nowhere if self._job.sink is None else self._job.sink.put
        if written.samples:
            tar, sidecar = builder.finish(task.fields)
            digest = self._threads.submit(hashlib.sha256, tar)
            put(task.name, tar)
            put(sidecar_name(task.name), sidecar)
            written = written._replace(
                bytes=len(tar),
                sha256=digest.result().hexdigest(),
                sidecar_bytes=len(sidecar),
                sidecar_sha256=hashlib.sha256(sidecar).hexdigest(),
            )
        put(record_name(self._job.records, task.name), json.dumps(written._asdict()).encode())
        return written


def _done(written: Written) -> Future[Written]:
    future: Future[Written] = Future()
    future.set_result(written)
    return future


def _put_nowhere(name: str, data: bytes | memoryview) -> None:
    """Stand in for a sink's `put` when only the checksums are wanted."""


def _read(samples: list[Sample]) -> list[bytes | Exception]:
    contents: list[bytes | Exception] = []
    for sample in samples:
        try:
            contents.append(sample.load())
        except (OSError, ValueError) as error:
            contents.append(error)
    return contents


def _prepared(content: bytes | Exception, images: ImagePolicy) -> tuple[bytes, Size]:
    if isinstance(content, Exception):
        raise BadImage(str(content)) from content
    return prepare(content, images)


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
    storing: tuple[Task, Future[Written]] | None = None
    try:
        for task in (*tasks, None):
            begun = (task, writer.begin(task, check_only)) if task else None
            if storing:
                written = storing[1].result()
                check_only = check_only or (bool(written.bad) and not job.skip)
                yield storing[0], written
            storing = begun
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
    """Set up a process of the pool: it leaves signals to its parent and ends when the parent is gone."""
    global _writer

    for number in (signal.SIGINT, signal.SIGTERM):  # both may go to the whole group
        signal.signal(number, signal.SIG_IGN)
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
    return _writer.begin(task, check_only).result()
