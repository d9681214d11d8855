"""Which sample when: a pure function of (index, seed, epoch), never of ranks, loader workers or restarts.

The shards, in an order drawn for each epoch, form one sequence of N samples. It is cut into P canonical partitions
of ⌊N/P⌋ samples, starting at an offset that rotates so that the remainder left out differs by epoch. Each partition
is shuffled in windows, and global step s takes B/P samples of every partition. Ranks own whole partitions.

Sample ids are positions in index order: shards as listed, samples as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets_prep.errors import UserError
from service.data.draws import hash_numpy, key, permutation

Ids = NDArray[np.int64]


class _Layout(NamedTuple):
    """One epoch's sequence: where each shard, in drawn order, starts there and in id order."""

    order: Ids  # shard numbers
    starts: Ids  # position in the sequence of each shard of `order`
    offset: int  # position where partition 0 starts


@dataclass(frozen=True)
class SamplePlan:
    """Sample order of one split.

    Args:
        shard_samples: samples of each shard, in index order.
        batch_size: samples of a global step, B.
        partitions: canonical partitions, P; must divide B.
        window: samples of a partition that are shuffled together.
        seed: of the run.
    """

    shard_samples: tuple[int, ...]
    batch_size: int
    partitions: int
    window: int
    seed: int

    def __post_init__(self) -> None:
        assert self.batch_size % self.partitions == 0, "canonical_partitions() makes P divide B"
        if self.steps_per_epoch < 1:
            raise UserError(
                f"data.batch_size={self.batch_size} over {self.partitions} partitions needs "
                f"{self._per_step * self.partitions} samples with at least {self._per_step} in each partition, and the "
                f"split has {self.samples}: lower data.batch_size or data.partitions"
            )

    @property
    def samples(self) -> int:
        """Samples of the split, N."""
        return sum(self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Global steps that an epoch has, equal on every rank."""
        return self._per_partition // self._per_step

    @property
    def _per_partition(self) -> int:
        return self.samples // self.partitions

    @property
    def _per_step(self) -> int:
        return self.batch_size // self.partitions

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Ids:
        """Sample ids, (B / world,), of a rank's slice of global `step`, counted from the start of the run.

        The slices of all ranks, concatenated in rank order, are the batch of a world of one.
        """
        if self.partitions % world:
            raise UserError(
                f"a world of {world} ranks does not divide the plan's {self.partitions} partitions: use a number of "
                "workers that divides them"
            )
        epoch, step = divmod(step, self.steps_per_epoch)
        owned = self.partitions // world
        partitions = np.arange(rank * owned, (rank + 1) * owned)
        local = self._shuffled(epoch, step, partitions)
        layout = _layout(self, epoch)
        position = (layout.offset + partitions[:, None] * self._per_partition + local) % self.samples
        return self._ids(layout, position).ravel()

    def epoch_shards(self, epoch: int, rank: int = 0, world: int = 1) -> list[int]:
        """Shards that a rank opens in `epoch`, in the order of its partitions."""
        owned = self.partitions // world * self._per_partition
        layout = _layout(self, epoch)
        position = (layout.offset + rank * owned + np.arange(owned)) % self.samples
        shards = layout.order[np.searchsorted(layout.starts, position, side="right") - 1]
        return list(dict.fromkeys(shards.tolist()))

    def _shuffled(self, epoch: int, step: int, partitions: Ids) -> Ids:
        """Positions inside each partition that `step` takes, (partitions, B/P)."""
        wanted = np.arange(step * self._per_step, (step + 1) * self._per_step)
        pieces: list[Ids] = []
        for window in range(wanted[0] // self.window, wanted[-1] // self.window + 1):
            start = window * self.window
            order = _window_order(self, epoch, window, int(partitions[0]), len(partitions))
            inside = wanted[(wanted >= start) & (wanted < start + self.window)] - start
            pieces.append(start + order[:, inside])
        return np.concatenate(pieces, axis=1)

    def _ids(self, layout: _Layout, position: Ids) -> Ids:
        first_id = np.concatenate([[0], np.cumsum(self.shard_samples)[:-1]])
        slot = np.searchsorted(layout.starts, position, side="right") - 1
        return first_id[layout.order[slot]] + position - layout.starts[slot]


@lru_cache(maxsize=4)
def _layout(plan: SamplePlan, epoch: int) -> _Layout:
    order = permutation(key(plan.seed, epoch, 1), len(plan.shard_samples))
    sizes = np.asarray(plan.shard_samples)[order]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    left_out = plan.samples % plan.partitions
    return _Layout(order, starts, epoch * left_out % plan.samples)


@lru_cache(maxsize=4)
def _window_order(plan: SamplePlan, epoch: int, window: int, first: int, count: int) -> Ids:
    """Shuffled positions of one window, (count, size), for partitions `first` … `first + count − 1`."""
    size = min(plan.window, plan.samples // plan.partitions - window * plan.window)
    keys = hash_numpy(key(plan.seed, epoch, 2, window), np.arange(first, first + count))
    return np.argsort(hash_numpy(0, keys[:, None] ^ np.arange(size, dtype=np.uint64)), axis=1, kind="stable")


def locate(shard_samples: tuple[int, ...], ids: Ids) -> tuple[Ids, Ids]:
    """Turn sample ids into (shard number, row in the shard)."""
    starts = np.concatenate([[0], np.cumsum(shard_samples)[:-1]])
    shards = np.searchsorted(starts, ids, side="right") - 1
    return shards, ids - starts[shards]


def check_cache(plan: SamplePlan, *, budget_bytes: float, shard_bytes: int, hosts: int) -> None:
    """Refuse a shard cache in which the shards of a host's open partitions, and the next ones, do not fit."""
    open_partitions = -(-plan.partitions // hosts)
    shards = min(2 * open_partitions, len(plan.shard_samples))
    if shards * shard_bytes > budget_bytes:
        raise UserError(
            f"data.cache_gb={budget_bytes / 1e9:g} is less than the {shards * shard_bytes / 1e9:.1f} GB that "
            f"{open_partitions} open partitions of {shard_bytes / 1e6:.0f} MB shards need twice over: "
            "raise data.cache_gb, lower data.partitions or write smaller shards"
        )
