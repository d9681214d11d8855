"""From a config to batches: the reader that `data.mode` names, for training and for evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from service.config import Data
from service.data.augment import view_kinds
from service.data.budget import over_budget
from service.data.cache import ShardCache
from service.data.plan import Plan, SamplePlan, check_cache
from service.data.resident import ResidentBatches, load_images
from service.data.split import DataSplit, OpenShard, decode_side, remote_bytes, resolve_mode, shards_of, whole_side
from service.data.stream import Crops, Squares, StreamBatches, decoding_threads


def open_batches(
    sources: Sequence[DataSplit], plan: Plan, data: Data, *, views: int, seed: int, device: torch.device, hosts: int
) -> ResidentBatches | StreamBatches:
    """Open the reader of the samples to train on; refuses a cache that the plan would thrash.

    Args:
        sources: splits that the plan orders.
        plan: of the run.
        data: settings.
        views: global ones that a family takes of each image.
        seed: of the run.
        device: where batches go.
        hosts: machines that the ranks run on.
    """
    if isinstance(plan, SamplePlan) and resolve_mode(sources[0], data) == "resident":
        images, bad = load_images(sources[0], data.largest_side, data.workers, data.max_bad)
        return ResidentBatches(images, plan, device, bad.tolist())
    check_cache(plan, budget_bytes=data.cache_gb * 1e9, shard_bytes=remote_bytes(sources), hosts=hosts)
    return StreamBatches(
        shards_of(sources),
        plan,
        choose_decoder(sources, data, views=views, seed=seed),
        cache=ShardCache(data.cache_gb * 1e9),
        workers=data.workers,
        prefetch=data.prefetch,
        max_bad=data.max_bad,
        device=device,
    )


def choose_decoder(sources: Sequence[DataSplit], data: Data, *, views: int, seed: int) -> Squares | Crops:
    """Decide what is decoded of images to train on: whole squares, or already the crops of their views."""
    if not data.mixture and resolve_mode(sources[0], data) == "resident":
        return Squares(decode_side(sources[0], data.largest_side))
    side = whole_side(sources, data.image_size)
    return Squares(side) if side else Crops(view_kinds(data, views), seed)


def sequential(split: DataSplit, data: Data, start: int, stop: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield samples `start` … `stop − 1` in id order, once each.

    Yields:
        Images (≤ batch, 3, H, W) uint8 and whether they could be read, (≤ batch,) bool, on the CPU; what could not,
        if `data.max_bad` allows that, is black.
    """
    if resolve_mode(split, data) == "resident":
        images, bad = load_images(split, data.largest_side, data.workers, data.max_bad)
        readable = np.isin(np.arange(split.samples), bad, invert=True)
        for first in range(start, stop, batch):
            chosen = slice(first, min(first + batch, stop))
            yield torch.from_numpy(images[chosen]), torch.from_numpy(readable[chosen])
        return
    yield from _streamed(split, data, start, stop, batch)


def _streamed(split: DataSplit, data: Data, start: int, stop: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    side = decode_side(split, data.eval_image_size)
    faults: list[str] = []
    with decoding_threads(data.workers) as pool:
        for opened, rows in _shards_between(split, data, start, stop):
            for first in range(rows.start, rows.stop, batch):
                some = range(first, min(first + batch, rows.stop))
                decoded = list(pool.map(lambda row, shard=opened: _square(shard, row, side), some))
                faults += [pixels for pixels in decoded if isinstance(pixels, str)]
                if len(faults) > data.max_bad:
                    raise over_budget(len(faults), data.max_bad, faults)
                black = np.zeros((side, side, 3), np.uint8)
                images = np.stack([black if isinstance(pixels, str) else pixels for pixels in decoded])
                readable = torch.tensor([not isinstance(pixels, str) for pixels in decoded])
                yield torch.from_numpy(images).permute(0, 3, 1, 2), readable


def _square(opened: OpenShard, row: int, side: int) -> np.ndarray | str:
    [pixels] = Squares(side).decode([opened.encoded(row)], np.array([row]), 0)
    return opened.fault(row, pixels) if isinstance(pixels, ValueError) else pixels[0]


def _shards_between(split: DataSplit, data: Data, start: int, stop: int) -> Iterator[tuple[OpenShard, range]]:
    """Shards that hold samples `start` … `stop − 1`, fetched ahead, with the rows of those samples."""
    cache = ShardCache(data.cache_gb * 1e9)
    coming: deque[tuple[Future[OpenShard], range]] = deque()
    with ThreadPoolExecutor(data.prefetch) as pool:
        first = 0
        for shard in split.rows.shards:
            rows = range(max(start - first, 0), min(stop - first, shard.samples))
            first += shard.samples
            if rows:
                coming.append((pool.submit(split.open_shard, shard, cache.fetch), rows))
            if len(coming) > data.prefetch:
                future, rows = coming.popleft()
                yield future.result(), rows
        while coming:
            future, rows = coming.popleft()
            yield future.result(), rows
