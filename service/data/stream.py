"""Batches of a plan straight from shards: whole tars into a node's cache, memory-mapped, decoded ahead by threads."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets_prep.index import Shard
from service.data.plan import SamplePlan, locate
from service.data.resident import cache_root
from service.data.split import DataSplit, Pixels, decode_sample, decode_side

_STEPS_AHEAD = 3


class ShardCache:
    """Shards as files of a node's cache folder, least recently used ones removed beyond a byte budget.

    Files appear by rename, under a name that holds their checksum, so processes of a node can share the folder.
    """

    def __init__(self, split: DataSplit, budget_bytes: float) -> None:
        self.split, self.budget = split, budget_bytes
        self.folder = cache_root() / "shards"
        self.folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, shard: Shard) -> mmap.mmap:
        """Map a shard's tar, fetching it first when it is not here."""
        path = self.folder / f"{shard.sha256}.tar"
        with open(self.folder / "lock", "w") as lock:  # one for the folder: what is found here is not evicted meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                data = self.split.shard_bytes(shard)
                self._make_room(len(data))
                unfinished = path.with_suffix(f".{os.getpid()}.tmp")
                unfinished.write_bytes(data)
                unfinished.rename(path)
            os.utime(path)
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _make_room(self, wanted: int) -> None:
        files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("*.tar")), reverse=True)
        used = wanted
        for _, size, path in files:
            used += size
            if used > self.budget:
                path.unlink(missing_ok=True)  # a mapping of it stays valid


class StreamBatches:
    """As `ResidentBatches`, pixel for pixel, without holding the split: for data sets larger than memory.

    Args:
        split: what to read.
        plan: of the split.
        image_size: side of the views, which decides the side that images are decoded to.
        workers: decoding threads.
        cache_gb: byte budget of the node's shard cache, in GB.
        device: where batches go.
    """

    def __init__(
        self,
        split: DataSplit,
        plan: SamplePlan,
        *,
        image_size: int,
        workers: int,
        cache_gb: float,
        device: torch.device,
    ) -> None:
        self.split, self.plan, self.workers, self.device = split, plan, workers, device
        self.side = decode_side(split, image_size)
        self.cache = ShardCache(split, cache_gb * 1e9)
        self._opened = lru_cache(maxsize=2 * plan.partitions)(self._open)

    def _open(self, number: int) -> tuple[mmap.mmap, NDArray[np.void]]:
        shard = self.split.rows.shards[number]
        return self.cache.fetch(shard), self.split.sidecar(shard)

    def _decode(self, number: int, row: int) -> Pixels:
        tar, rows = self._opened(number)
        return decode_sample(self.split, self.split.rows.shards[number], rows[row], memoryview(tar), self.side)

    def iterate(self, start: int, stop: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, 3, H, W) uint8, ids (B,)) of global steps `start` … `stop − 1` on the device."""
        with ThreadPoolExecutor(self.workers) as pool:
            ahead: deque[tuple[NDArray[np.int64], list[Future[Pixels]]]] = deque()
            try:
                for step in range(start, stop):
                    ids = self.plan.batch(step, rank, world)
                    places = zip(*locate(self.plan.shard_samples, ids), strict=True)
                    ahead.append((ids, [pool.submit(self._decode, int(n), int(r)) for n, r in places]))
                    if len(ahead) > _STEPS_AHEAD:
                        yield self._collect(*ahead.popleft())
                while ahead:
                    yield self._collect(*ahead.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _collect(self, ids: NDArray[np.int64], futures: list[Future[Pixels]]) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.stack([f.result() for f in futures])).permute(0, 3, 1, 2)
        return images.to(self.device, non_blocking=True), torch.from_numpy(ids).to(self.device, non_blocking=True)
