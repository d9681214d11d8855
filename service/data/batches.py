"""From a config to batches: the split, its plan, and the reader that `data.mode` names."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from service.config import Data, canonical_partitions
from service.data.plan import SamplePlan, check_cache, locate
from service.data.resident import ResidentBatches, load_images
from service.data.split import DataSplit, decode_sample, decode_side, resolve_mode
from service.data.stream import StreamBatches


def make_plan(split: DataSplit, data: Data, seed: int) -> SamplePlan:
    """Plan the training split of a config."""
    partitions = canonical_partitions(data.partitions, data.batch_size)
    return SamplePlan(split.shard_samples, data.batch_size, partitions, data.window, seed)


def open_batches(
    split: DataSplit, plan: SamplePlan, data: Data, *, device: torch.device, hosts: int
) -> ResidentBatches | StreamBatches:
    """Open the reader of a training split; refuses a cache that the plan would thrash."""
    if resolve_mode(split, data) == "resident":
        return ResidentBatches(load_images(split, data.largest_side, data.workers), plan, device)
    largest = max(shard.bytes for shard in split.rows.shards)
    check_cache(plan, budget_bytes=data.cache_gb * 1e9, shard_bytes=largest, hosts=hosts)
    return StreamBatches(
        split, plan, image_size=data.image_size, workers=data.workers, cache_gb=data.cache_gb, device=device
    )


def sequential(split: DataSplit, data: Data, start: int, stop: int, batch: int) -> Iterator[Tensor]:
    """Yield samples `start` … `stop − 1` in id order, once each, as (≤ batch, 3, H, W) uint8 on the CPU."""
    if resolve_mode(split, data) == "resident":
        images = load_images(split, data.largest_side, data.workers)
        for first in range(start, stop, batch):
            yield torch.from_numpy(images[first : min(first + batch, stop)])
        return
    side = decode_side(split, data.eval_image_size)
    numbers, rows = locate(split.shard_samples, np.arange(start, stop))
    with ThreadPoolExecutor(data.workers) as pool:
        for number in dict.fromkeys(numbers.tolist()):
            shard = split.rows.shards[number]
            tar, sidecar = split.shard_bytes(shard), split.sidecar(shard)
            wanted = sidecar[rows[numbers == number]]
            for first in range(0, len(wanted), batch):
                decode = partial(decode_sample, split, shard, tar=tar, side=side)
                pixels = list(pool.map(decode, wanted[first : first + batch]))
                yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
