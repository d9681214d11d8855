"""Batches of a plan straight from shards: fetched ahead by some threads, decoded ahead by others.

Shape legend: B samples of a rank's batch, V views, S side of a decoded square.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Thread
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets_prep.errors import UserError
from datasets_prep.index import Shard
from service.data.augment import ViewKind, crop_boxes
from service.data.budget import ATTEMPTS, ErrorBudget, replacement
from service.data.cache import ShardCache
from service.data.decode import Pixels, decode_crops, decode_rgb, fit, image_size
from service.data.plan import Ids, Plan
from service.data.split import DataSplit, OpenShard

_STEPS_AHEAD = 3
_LOOKS = 64  # steps that are looked at for their shards before one batch
_PART = 32  # samples that one task decodes at most: few enough to share out, enough to draw their crops at once


Images = Tensor | list[Tensor]


class Decoder(Protocol):
    """How encoded images become pixels."""

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of a batch's arrays: samples on the axis before the last three."""
        ...

    def decode(self, encoded: Sequence[memoryview], ids: Ids, epoch: int) -> list[list[Pixels] | ValueError]:
        """Pixels of each image, (…, S, S, 3) for each array, or why there are none."""
        ...


@dataclass(frozen=True)
class Squares:
    """The centre square of each image, antialiased: batches (B, S, S, 3)."""

    side: int

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """As `Decoder.shapes`."""
        return [(batch, self.side, self.side, 3)]

    def decode(self, encoded: Sequence[memoryview], ids: Ids, epoch: int) -> list[list[Pixels] | ValueError]:
        """As `Decoder.decode`."""
        return [_attempt(lambda data: [fit(decode_rgb(data), self.side)], data) for data in encoded]


@dataclass(frozen=True)
class Crops:
    """Random crops of each image, all from one decoding, antialiased: batches (V, B, S, S, 3) of each kind of view."""

    kinds: Sequence[ViewKind]
    seed: int

    def shapes(self, batch: int) -> list[tuple[int, ...]]:
        """As `Decoder.shapes`."""
        return [(len(kind.numbers), batch, kind.size, kind.size, 3) for kind in self.kinds]

    def decode(self, encoded: Sequence[memoryview], ids: Ids, epoch: int) -> list[list[Pixels] | ValueError]:
        """As `Decoder.decode`."""
        sizes = [_attempt(image_size, data) for data in encoded]
        heights, widths = np.array([(1, 1) if isinstance(size, ValueError) else size for size in sizes]).T
        kinds = [(self._boxes(kind, ids, heights, widths, epoch), kind.size) for kind in self.kinds]
        return [
            size if isinstance(size, ValueError) else _attempt(decode_crops, data, *((b[i], side) for b, side in kinds))
            for i, (size, data) in enumerate(zip(sizes, encoded, strict=True))
        ]

    def _boxes(
        self, kind: ViewKind, ids: Ids, heights: NDArray[np.int64], widths: NDArray[np.int64], epoch: int
    ) -> NDArray[np.int64]:
        """Crops of all views of a kind, (B, V, 4)."""
        draw = {"config": kind.config, "seed": self.seed, "epoch": epoch}
        return np.stack([crop_boxes(ids, heights, widths, view=view, **draw) for view in kind.numbers], 1)


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        return error


def decoding_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operations each run in their thread alone."""
    return ThreadPoolExecutor(count, initializer=_compute_alone, initargs=(torch.get_num_threads(),))


def _compute_alone(threads: int) -> None:
    """Take no further threads for the calling thread's operations: waiting for them costs more than resizing an image.

    torch keeps such a number for each thread and one for threads to come; the latter, `threads`, is put back.
    """
    torch.get_num_threads()  # the first call in a thread sets its number to that of threads to come
    torch.set_num_threads(1)
    restoring = Thread(target=torch.set_num_threads, args=(threads,))
    restoring.start()
    restoring.join()


class ShardQueue:
    """Open shards of a reader by number, in order of use; the least recently used are let go beyond `most`.

    Only the thread that iterates may call it.
    """

    def __init__(
        self, shards: Sequence[tuple[DataSplit, Shard]], cache: ShardCache, most: int, pool: ThreadPoolExecutor
    ) -> None:
        self._shards, self._cache, self._most, self._pool = shards, cache, most, pool
        self._opened: OrderedDict[int, Future[OpenShard]] = OrderedDict()

    def request(self, numbers: Collection[int]) -> None:
        """Start to fetch what is not open; none of `numbers` is let go for another of them."""
        for number in numbers:
            if number not in self._opened:
                split, shard = self._shards[number]
                self._opened[number] = self._pool.submit(split.open_shard, shard, self._cache.fetch)
            self._opened.move_to_end(number)
        while len(self._opened) > max(self._most, len(numbers)):
            self._opened.popitem(last=False)[1].cancel()

    def are_open(self, numbers: Iterable[int]) -> bool:
        """Say whether `get` would return at once."""
        return all(number in self._opened and self._opened[number].done() for number in numbers)

    def get(self, number: int) -> OpenShard:
        """Wait for a requested shard; raises what went wrong in fetching it."""
        self._opened.move_to_end(number)
        return self._opened[number].result()

    def cancel(self) -> None:
        """Take back all requests that have not begun."""
        for future in self._opened.values():
            future.cancel()

    def unfinished(self) -> int:
        """Number of shards that are still to come."""
        return sum(not future.done() for future in self._opened.values())


class StreamBatches:
    """As `ResidentBatches`, without holding the samples: for data sets larger than memory.

    Args:
        shards: of the sources, in the order of the plan.
        plan: of the samples.
        decoder: what becomes of an image.
        cache: of the node.
        workers: decoding threads.
        prefetch: shards fetched at once.
        max_bad: unreadable samples that an epoch may have.
        device: where batches go.
    """

    def __init__(
        self,
        shards: Sequence[tuple[DataSplit, Shard]],
        plan: Plan,
        decoder: Decoder,
        *,
        cache: ShardCache,
        workers: int,
        prefetch: int,
        max_bad: int,
        device: torch.device,
    ) -> None:
        self.shards, self.plan, self.decoder, self.cache, self.device = shards, plan, decoder, cache, device
        self.workers, self.prefetch = workers, prefetch
        self.budget = ErrorBudget(max_bad)
        # One set of threads for all passes: the allocator keeps memory for every thread that it has ever served.
        self.fetching, self.decoding = ThreadPoolExecutor(prefetch), decoding_threads(workers)

    def iterate(self, start: int, stop: int, rank: int, world: int) -> Iterator[tuple[Images, Tensor]]:
        """Yield (images, ids (B,)) of global steps `start` … `stop − 1` on the device.

        Images are uint8, (B, 3, S, S), or where the decoder cuts views (V, B, 3, S, S) of each kind.
        """
        steps = _Steps(self, range(start, stop), rank, world)
        try:
            yield from steps
        finally:
            steps.close()

    def part(self, out: Sequence[Pixels], ids: Ids, places: Sequence[tuple[OpenShard, int]], epoch: int) -> list[str]:
        """Decode samples into `out`, arrays (…, samples, S, S, 3), and say which were bad.

        Those are replaced: `ids` then holds the ids of what `out` shows.
        """
        encoded = [opened.encoded(row) for opened, row in places]
        faults: list[str] = []
        for i, pixels in enumerate(self.decoder.decode(encoded, ids, epoch)):
            if isinstance(pixels, ValueError):
                opened, row = places[i]
                faults.append(opened.fault(row, pixels))
                if not self.budget.most:
                    break
                ids[i], pixels = self._replace(int(ids[i]), opened, row, epoch)
            for array, made in zip(out, pixels, strict=True):
                array[..., i, :, :, :] = made
        return faults

    def _replace(self, id_: int, opened: OpenShard, row: int, epoch: int) -> tuple[int, list[Pixels]]:
        for attempt in range(ATTEMPTS):
            other = replacement(self.plan, id_, attempt)
            encoded = [opened.encoded(row + other - id_)]
            [pixels] = self.decoder.decode(encoded, np.array([other]), epoch)
            if not isinstance(pixels, ValueError):
                return other, pixels
        raise UserError(f"{opened.uri}: {ATTEMPTS} samples drawn to replace one all cannot be decoded: shard again")


class _Steps:
    """One pass of a reader over consecutive steps, with its threads."""

    def __init__(self, reader: StreamBatches, steps: range, rank: int, world: int) -> None:
        self._reader, self._plan, self._place = reader, reader.plan, (rank, world)
        self._next = self._looked = steps.start  # the step to decode next, and to look at for its shards
        self._stop = steps.stop
        self._ids: dict[int, Ids] = {}  # of the steps between
        most = reader.plan.most_open(np.ones(len(reader.shards), np.int64), world)
        self._queue = ShardQueue(reader.shards, reader.cache, most + reader.prefetch, reader.fetching)
        self._ahead: deque[_Batch] = deque()

    def close(self) -> None:
        """Take back what the threads have not begun; what they are at is finished first."""
        for batch in self._ahead:
            for part in batch.parts:
                part.cancel()
        self._queue.cancel()

    def __iter__(self) -> Iterator[tuple[Images, Tensor]]:
        ahead: deque[_Batch] = deque()
        while self._next < self._stop or ahead:
            while self._next < self._stop and len(ahead) <= _STEPS_AHEAD:
                self._look_ahead()
                numbers, rows = self._plan.locate(self._ids[self._next])
                needed = np.unique(numbers).tolist()
                if ahead and not self._queue.are_open(needed):
                    break  # what is decoded already need not wait for the network
                self._queue.request(needed)
                opened = {number: self._queue.get(number) for number in needed}
                places = [(opened[n], row) for n, row in zip(numbers.tolist(), rows.tolist(), strict=True)]
                ahead.append(self._start(places))
            yield self._finish(ahead.popleft())

    def _look_ahead(self) -> None:
        """Request the shards of coming steps in order of need, up to a window ahead."""
        until = min(self._stop, self._next + self._plan.steps_per_window + 1)
        for step in range(self._looked, min(until, self._looked + _LOOKS)):
            if step > self._next and self._queue.unfinished() >= 2 * self._reader.prefetch:
                return
            ids = self._ids[step] = self._plan.batch(step, *self._place)
            self._queue.request(np.unique(self._plan.locate(ids)[0]).tolist())
            self._looked = step + 1

    def _start(self, places: Sequence[tuple[OpenShard, int]]) -> _Batch:
        """Decode the next step, whose samples are at `places`."""
        reader, ids = self._reader, self._ids.pop(self._next)
        epoch = self._next // self._plan.steps_per_epoch
        self._next += 1
        images = [_room(s, pinned=reader.device.type == "cuda") for s in reader.decoder.shapes(len(ids))]
        size = min(_PART, -(-len(ids) // reader.workers))
        parts = [
            reader.decoding.submit(
                reader.part,
                [array.numpy()[..., i : i + size, :, :, :] for array in images],
                ids[i : i + size],
                places[i : i + size],
                epoch,
            )
            for i in range(0, len(ids), size)
        ]
        return _Batch(epoch, images, ids, parts)

    def _finish(self, batch: _Batch) -> tuple[Images, Tensor]:
        device, budget = self._reader.device, self._reader.budget
        for part in batch.parts:
            budget.spend(batch.epoch, part.result())
        images = [array.movedim(-1, -3).to(device, non_blocking=True) for array in batch.images]
        ids = torch.from_numpy(batch.ids).to(device, non_blocking=True)
        return images[0] if images[0].ndim == 4 else images, ids


def _room(shape: tuple[int, ...], *, pinned: bool) -> Tensor:
    """Uninitialised bytes; numpy asks the system for huge pages, torch for memory that a GPU can fetch from."""
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty(shape, np.uint8))


@dataclass(frozen=True)
class _Batch:
    """A batch that is being decoded."""

    epoch: int
    images: list[Tensor]
    ids: Ids
    parts: list[Future[list[str]]]
