"""Batches of a plan straight from shards: fetched ahead by some threads, decoded ahead by others.

Shape legend: B samples of a rank's batch, V views, S side of a decoded square.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets_prep.errors import UserError
from datasets_prep.index import Shard
from service.config import Augment
from service.data.augment import crop_boxes
from service.data.budget import ATTEMPTS, ErrorBudget, replacement
from service.data.cache import ShardCache
from service.data.decode import Pixels, decode_crops, decode_rgb, fit, image_size
from service.data.plan import Ids, Plan
from service.data.split import DataSplit, OpenShard

_STEPS_AHEAD = 3
_PART = 32  # samples that one task decodes at most: few enough to share out, enough to draw their crops at once


class Decoder(Protocol):
    """How encoded images become pixels."""

    def shape(self, batch: int) -> tuple[int, ...]:
        """Shape of a batch: samples on the axis before the last three."""
        ...

    def decode(self, encoded: Sequence[memoryview], ids: Ids, epoch: int) -> list[Pixels | ValueError]:
        """Pixels of each image, (…, S, S, 3), or why there are none."""
        ...


@dataclass(frozen=True)
class Squares:
    """The centre square of each image, antialiased: batches (B, S, S, 3)."""

    side: int

    def shape(self, batch: int) -> tuple[int, ...]:
        """As `Decoder.shape`."""
        return (batch, self.side, self.side, 3)

    def decode(self, encoded: Sequence[memoryview], ids: Ids, epoch: int) -> list[Pixels | ValueError]:
        """As `Decoder.decode`."""
        return [_attempt(lambda data: fit(decode_rgb(data), self.side), data) for data in encoded]


@dataclass(frozen=True)
class Crops:
    """Random crops of each image, all from one decoding, antialiased: batches (V, B, S, S, 3)."""

    augment: Augment
    side: int
    views: int
    seed: int

    def shape(self, batch: int) -> tuple[int, ...]:
        """As `Decoder.shape`."""
        return (self.views, batch, self.side, self.side, 3)

    def decode(self, encoded: Sequence[memoryview], ids: Ids, epoch: int) -> list[Pixels | ValueError]:
        """As `Decoder.decode`."""
        sizes = [_attempt(image_size, data) for data in encoded]
        heights, widths = np.array([(1, 1) if isinstance(size, ValueError) else size for size in sizes]).T
        draw = {"config": self.augment, "seed": self.seed, "epoch": epoch}
        boxes = np.stack([crop_boxes(ids, heights, widths, view=view, **draw) for view in range(self.views)], 1)
        return [
            size if isinstance(size, ValueError) else _attempt(decode_crops, data, box, self.side)
            for size, data, box in zip(sizes, encoded, boxes, strict=True)
        ]


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        return error


class ShardQueue:
    """Open shards of a reader by number, in order of use; the least recently used are let go beyond `most`.

    Only the thread that iterates may call it.
    """

    def __init__(self, shards: Sequence[tuple[DataSplit, Shard]], cache: ShardCache, most: int) -> None:
        self._shards, self._cache, self._most = shards, cache, most
        self._opened: OrderedDict[int, Future[OpenShard]] = OrderedDict()

    def request(self, numbers: Iterable[int], pool: ThreadPoolExecutor) -> None:
        """Start to fetch what is not open."""
        for number in numbers:
            if number not in self._opened:
                split, shard = self._shards[number]
                self._opened[number] = pool.submit(split.open_shard, shard, self._cache.fetch)
            self._opened.move_to_end(number)
        while len(self._opened) > self._most:
            self._opened.popitem(last=False)[1].cancel()

    def are_open(self, numbers: Iterable[int]) -> bool:
        """Say whether `get` would return at once."""
        return all(number in self._opened and self._opened[number].done() for number in numbers)

    def get(self, number: int) -> OpenShard:
        """Wait for a requested shard; raises what went wrong in fetching it."""
        self._opened.move_to_end(number)
        return self._opened[number].result()

    def forget_unfinished(self) -> None:
        """Drop what was requested and is not open, so that another pool can fetch it."""
        for number, future in list(self._opened.items()):
            if future.cancel() or not future.done() or future.exception():
                del self._opened[number]


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

    def iterate(self, start: int, stop: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, ids (B,)) of global steps `start` … `stop − 1` on the device.

        Images are uint8, (B, 3, S, S), or (V, B, 3, S, S) where the decoder cuts views.
        """
        open_at_once = self.plan.most_open(np.ones(len(self.shards), np.int64), world)
        queue = ShardQueue(self.shards, self.cache, open_at_once + self.prefetch)
        fetching, decoding = ThreadPoolExecutor(self.prefetch), ThreadPoolExecutor(self.workers)
        steps = deque(range(start, stop))
        looked, ahead = start, deque[_Step]()
        try:
            while steps or ahead:
                while steps and len(ahead) <= _STEPS_AHEAD:
                    looked = self._look_ahead(queue, fetching, looked, min(stop, steps[0] + self.plan.steps_per_window))
                    step = _Step(steps[0], *self._places(steps[0], rank, world))
                    ...
        finally:
            for pool in (decoding, fetching):
                pool.shutdown(wait=False, cancel_futures=True)
