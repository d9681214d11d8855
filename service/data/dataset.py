"""A sharded split as an iterable of batches, for any training program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets_prep.errors import UserError
from service.config import Augment, canonical_partitions
from service.data.augment import ViewKind
from service.data.cache import ShardCache
from service.data.plan import check_cache, owned_partitions
from service.data.split import DataSplit, plan_split, read_index, remote_bytes, shards_of
from service.data.store import Store
from service.data.stream import Crops, Squares, StreamBatches


class Batch(NamedTuple):
    """Images uint8, (V, B, 3, S, S) or (B, 3, S, S); labels int64, (B,), −1 for none; sample ids int64, (B,)."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class ShardDataset:
    """Batches of a split, in an order that depends on the data, the seed and the epoch alone.

    Each `for` loop goes through the rest of one epoch; the next goes through the next. The ranks of any world that
    divides `partitions` have equal numbers of batches, which together are the batches of one rank.

    Args:
        uri: folder or object-store address of a data set.
        split: to read.
        batch_size: samples of a step over all ranks.
        image_size: side S of the images in pixels.
        views: random crops of each image, V, cut from one decoding; 0 gives the centre square instead.
        augment: area and aspect ratio of the crops; nothing else of it is applied here.
        seed: of order and crops.
        rank: of this process.
        world: number of processes.
        partitions: canonical partitions, lowered until they divide `batch_size`.
        window: samples of a partition that are shuffled together; None takes a mean shard's.
        workers: decoding threads.
        prefetch: shards fetched at once.
        cache_gb: byte budget of the machine's shard cache.
        max_bad: unreadable samples of an epoch that are replaced by others before it is an error.
        device: where batches go.

    Raises:
        UserError: no such data set or split, too few samples, too small a cache; while iterating: missing or damaged
            shards and bad samples, by address.
    """

    def __init__(
        self,
        uri: str,
        split: str = "train",
        *,
        batch_size: int = 256,
        image_size: int = 224,
        views: int = 1,
        augment: Augment | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        partitions: int = 64,
        window: int | None = None,
        workers: int = 2,
        prefetch: int = 8,
        cache_gb: float = 20.0,
        max_bad: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        store = Store(uri)
        self.split = DataSplit(store, read_index(store), split)
        partitions = canonical_partitions(partitions, batch_size)
        self.plan = plan_split(self.split, batch_size=batch_size, partitions=partitions, window=window, seed=seed)
        owned_partitions(partitions, rank, world)
        check_cache(self.plan, budget_bytes=cache_gb * 1e9, shard_bytes=remote_bytes([self.split]), hosts=world)
        self.rank, self.world = rank, world
        crops = ViewKind(augment or Augment(), image_size, range(views))  # pyright: ignore[reportCallIssue]
        self._reader = StreamBatches(
            shards_of([self.split]),
            self.plan,
            Crops([crops], seed) if views else Squares(image_size),
            cache=ShardCache(cache_gb * 1e9),
            workers=workers,
            prefetch=prefetch,
            max_bad=max_bad,
            device=torch.device(device),
        )
        self._done = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.plan.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epoch that the next batch belongs to, from 0."""
        return self._done // len(self)

    @property
    def bad_samples(self) -> int:
        """Samples of the current epoch that this rank replaced."""
        return self._reader.budget.used

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches that are left of the current epoch."""
        stop = (self.epoch + 1) * len(self)
        for images, ids in self._reader.iterate(self._done, stop, self.rank, self.world):
            self._done += 1
            labels = torch.from_numpy(self.split.labels[ids.cpu().numpy()].astype(np.int64))
            yield Batch(images if isinstance(images, Tensor) else images[0], labels.to(ids.device), ids)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out, and what it is a position in; equal on every rank."""
        epoch, step = divmod(self._done, len(self))
        return {"epoch": epoch, "step": step, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, on any world; refuses a position in another order of samples."""
        ours, theirs = self._order(), state["order"]
        if differing := [name for name in ours if ours[name] != theirs.get(name)]:
            changes = ", ".join(f"{name} was {theirs.get(name)!r} and is {ours[name]!r}" for name in differing)
            raise UserError(f"this state is of another order of samples ({changes}): open the data set as it was")
        self._done = state["epoch"] * len(self) + state["step"]

    def _order(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "fingerprint": self.split.index.fingerprint,
            "split": self.split.name,
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "partitions": plan.partitions,
            "window": plan.window,
        }
