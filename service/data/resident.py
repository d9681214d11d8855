"""Small splits in memory: decoded once by threads, one memory-mapped copy a node, on the GPU if there is one."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service import watchdog
from service.data.budget import ATTEMPTS, ErrorBudget, over_budget, replacement
from service.data.cache import cache_root
from service.data.decode import DECODER, decode_rgb, fit
from service.data.plan import SamplePlan
from service.data.split import DataSplit, decode_side

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """A decoded split: pixels (N, 3, side, side), and the ids of unreadable samples, whose pixels are zero."""

    images: NDArray[np.uint8]
    bad: NDArray[np.int64]


def decode_split(split: DataSplit, side: int, workers: int, max_bad: int = 0) -> Decoded:
    """Decode every sample by `workers` threads; more than `max_bad` bad ones are named in one error."""
    images = np.zeros((split.samples, 3, side, side), np.uint8)
    faults: dict[int, str] = {}
    first = 0
    with ThreadPoolExecutor(workers) as pool:
        for shard in split.rows.shards:
            watchdog.beat()
            opened = split.open_shard(shard)

            def decode(row: int, opened=opened, first=first) -> None:
                try:
                    images[first + row] = fit(decode_rgb(opened.encoded(row)), side).transpose(2, 0, 1)
                except ValueError as error:
                    faults[first + row] = opened.fault(row, error)

            list(pool.map(decode, range(shard.samples), chunksize=64))
            first += shard.samples
    if len(faults) > max_bad:
        raise over_budget(len(faults), max_bad, sorted(faults.values()))
    return Decoded(images, np.array(sorted(faults), np.int64))


def load_images(split: DataSplit, image_size: int, workers: int, max_bad: int = 0) -> Decoded:
    """Decoded split, its pixels memory-mapped from one file that the processes of a node share.

    Where the cache cannot be written to, or is full, each process decodes into its own memory instead.
    """
    side = decode_side(split, image_size)
    path = cache_root() / "resident" / f"{split.index.fingerprint}-{split.name}-{side}-{max_bad}-{DECODER}.npy"
    try:
        with ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first process decodes, the others of the node wait and map its file
            if not path.exists():
                return _keep(path, decode_split(split, side, workers, max_bad))
            return _map(path)
    except OSError as error:
        log.warning("the cache %s does not work (%s): %r is decoded into memory", path.parent, error, split.name)
        return decode_split(split, side, workers, max_bad)


def _map(path: Path) -> Decoded:
    bad = np.load(path.with_suffix(".bad.npy"), allow_pickle=False)
    return Decoded(np.load(path, mmap_mode="c", allow_pickle=False), bad)


def _keep(path: Path, decoded: Decoded) -> Decoded:
    """Write a decoded split and map it; what cannot be written stays in memory."""
    unfinished = path.with_suffix(".tmp")  # a killed process's is overwritten: the lock is ours
    try:
        with open(path.with_suffix(".bad.npy"), "wb") as file:
            np.save(file, decoded.bad)
        with open(unfinished, "wb") as file:
            np.save(file, decoded.images)
        unfinished.rename(path)
        return _map(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        log.warning("the cache %s cannot keep %s (%s): it stays in memory", path.parent, path.name, error)
        return decoded


class ResidentBatches:
    """Batches of a plan from a split in memory.

    Args:
        images: decoded split, (N, 3, H, W) uint8.
        plan: of the split.
        device: where batches go; a CUDA device holds the whole split.
        bad: ids of unreadable samples; others take their places.
    """

    def __init__(
        self, images: NDArray[np.uint8], plan: SamplePlan, device: torch.device, bad: Collection[int] = ()
    ) -> None:
        self.plan, self.device = plan, device
        self.images = torch.from_numpy(images).to(device)
        self.budget = ErrorBudget(len(bad))
        self._instead = {id_: _readable(plan, id_, bad) for id_ in bad}

    def iterate(self, start: int, stop: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, 3, H, W) uint8, ids (B,)) of global steps `start` … `stop − 1` on the device."""
        for step in range(start, stop):
            planned = self.plan.batch(step, rank, world)
            if self._instead:
                bad = [id_ for id_ in planned.tolist() if id_ in self._instead]
                self.budget.spend(step // self.plan.steps_per_epoch, [f"sample {id_}" for id_ in bad])
                planned = np.array([self._instead.get(id_, id_) for id_ in planned.tolist()])
            ids = torch.from_numpy(planned)
            if self.device.type == "cuda":
                ids = ids.pin_memory().to(self.device, non_blocking=True)
            yield self.images[ids], ids


def _readable(plan: SamplePlan, id_: int, bad: Collection[int]) -> int:
    tried = (replacement(plan, id_, attempt) for attempt in range(ATTEMPTS))
    return next(other for other in tried if other not in bad)
