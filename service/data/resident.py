"""Small splits in memory: decoded once by threads, one memory-mapped copy a node, on the GPU if there is one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets_prep.errors import UserError
from service.data.decode import DECODER
from service.data.plan import SamplePlan
from service.data.split import DataSplit, decode_sample, decode_side

_FAULTS_SHOWN = 5


def cache_root() -> Path:
    """Folder of this node's caches: `TESSERA_CACHE`, else the user's cache folder."""
    base = os.environ.get("TESSERA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tessera"
    return Path(base)


def decode_split(split: DataSplit, side: int, workers: int) -> NDArray[np.uint8]:
    """Decode every sample by `workers` threads to (N, 3, side, side); all bad samples are named in one error."""
    images = np.empty((split.samples, 3, side, side), np.uint8)
    faults: list[str] = []
    starts = np.concatenate([[0], np.cumsum(split.shard_samples)])

    def decode(args: tuple[int, int, np.void, bytes]) -> None:
        number, row_number, row, tar = args
        try:
            pixels = decode_sample(split, split.rows.shards[number], row, tar, side)
            images[starts[number] + row_number] = pixels.transpose(2, 0, 1)
        except UserError as error:
            faults.append(str(error))

    with ThreadPoolExecutor(workers) as pool:
        for number, shard in enumerate(split.rows.shards):
            tar, rows = split.shard_bytes(shard), split.sidecar(shard)
            list(pool.map(decode, ((number, i, row, tar) for i, row in enumerate(rows)), chunksize=64))
    if faults:
        shown = "\n  ".join(sorted(faults)[:_FAULTS_SHOWN])
        raise UserError(
            f"{len(faults)} of {split.samples} samples cannot be decoded, shard again without them:\n  {shown}"
        )
    return images


def load_images(split: DataSplit, image_size: int, workers: int) -> NDArray[np.uint8]:
    """Decoded split, (N, 3, side, side), memory-mapped from one file that the processes of a node share."""
    side = decode_side(split, image_size)
    folder = cache_root() / "resident"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split.index.fingerprint}-{split.name}-{side}-{DECODER}.npy"
    with open(folder / f"{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first process decodes, the others of the node wait and map its file
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            with open(unfinished, "wb") as file:
                np.save(file, decode_split(split, side, workers))
            unfinished.rename(path)
    return np.load(path, mmap_mode="c", allow_pickle=False)


class ResidentBatches:
    """Batches of a plan from a split in memory.

    Args:
        images: decoded split, (N, 3, H, W) uint8.
        plan: of the split.
        device: where batches go; a CUDA device holds the whole split.
    """

    def __init__(self, images: NDArray[np.uint8], plan: SamplePlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.images = torch.from_numpy(images).to(device)

    def iterate(self, start: int, stop: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, 3, H, W) uint8, ids (B,)) of global steps `start` … `stop − 1` on the device."""
        for step in range(start, stop):
            ids = torch.from_numpy(self.plan.batch(step, rank, world))
            if self.device.type == "cuda":
                ids = ids.pin_memory().to(self.device, non_blocking=True)
            yield self.images[ids], ids
