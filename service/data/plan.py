"""Which sample when: a pure function of (index, seed, epoch), never of ranks, loader workers or restarts.

The shards, in an order drawn for each epoch, form one sequence of N samples. It is cut into P canonical partitions
of ⌊N/P⌋ samples, starting at an offset that rotates so that the remainder left out differs by epoch. Each partition
is shuffled in windows, and global step s takes B/P samples of every partition. Ranks own whole partitions.

A mixture gives each source such a sequence of its own, and every slot of a partition to one source, in turn.

Sample ids are positions in index order: shards as listed, samples as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datasets_prep.errors import UserError
from service.data.draws import hash_numpy, key, permutation

Ids = NDArray[np.int64]
_SHARES = 1_000_000  # weights of a mixture are rounded to this many parts, so that turns are integer arithmetic


class _Layout(NamedTuple):
    """One epoch's sequence: where each shard, in drawn order, starts there and in id order."""

    order: Ids  # shard numbers
    starts: Ids  # position in the sequence of each shard of `order`
    offset: int  # position where partition 0 starts


@dataclass(frozen=True, eq=False)
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

    @cached_property
    def samples(self) -> int:
        """Samples of the split, N."""
        return sum(self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Global steps that an epoch has, equal on every rank."""
        return self.per_partition // self._per_step

    @property
    def per_partition(self) -> int:
        """Samples of a partition."""
        return self.samples // self.partitions

    @property
    def _per_step(self) -> int:
        return self.batch_size // self.partitions

    @property
    def steps_per_window(self) -> int:
        """Steps in which the plan goes through one window: how far ahead shards are worth fetching."""
        return max(1, min(self.window, self.per_partition) // self._per_step)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Ids:
        """Sample ids, (B / world,), of a rank's slice of global `step`, counted from the start of the run.

        The slices of all ranks, concatenated in rank order, are the batch of a world of one.
        """
        owned = owned_partitions(self.partitions, rank, world)
        epoch, step = divmod(step, self.steps_per_epoch)
        taken = np.arange(step * self._per_step, (step + 1) * self._per_step)
        return self.pick(owned, epoch, np.asarray(owned)[:, None], taken[None, :]).ravel()

    def pick(self, owned: range, epoch: int, partition: Ids, taken: Ids) -> Ids:
        """Ids of the `taken`-th samples, from 0, of partitions of `owned` in an epoch; arrays that broadcast."""
        partition, taken = np.broadcast_arrays(partition, taken)
        local = np.empty(taken.shape, np.int64)
        for window in np.unique(taken // self.window).tolist():
            inside = taken // self.window == window
            size = min(self.window, self.per_partition - window * self.window)
            order = _window_order(key(self.seed, epoch, 2, window), owned.start, len(owned), size)
            rows, columns = partition[inside] - owned.start, taken[inside] - window * self.window
            local[inside] = window * self.window + order[rows, columns]
        layout = _layout(self, epoch)
        position = (layout.offset + partition * self.per_partition + local) % self.samples
        slot = np.searchsorted(layout.starts, position, side="right") - 1
        return self._first_ids[layout.order[slot]] + position - layout.starts[slot]

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """Turn sample ids into (shard number, row in the shard)."""
        shards = np.searchsorted(self._first_ids, ids, side="right") - 1
        return shards, ids - self._first_ids[shards]

    @cached_property
    def _first_ids(self) -> Ids:
        return _starts(np.asarray(self.shard_samples))

    def most_open(self, weights: Ids, groups: int) -> int:
        """Largest sum of `weights`, one a shard, over what a window and the next one touch.

        Args:
            weights: of each shard, such as its bytes, (shards,).
            groups: equal groups, such as hosts, that the partitions are dealt to; the sum is over the worst one.
        """
        layout = _layout(self, 0)
        starts = np.concatenate([layout.starts + turn * self.samples for turn in range(4)])  # partitions wrap around
        total = np.concatenate([[0], np.cumsum(np.tile(weights[layout.order], 4))])
        first = layout.offset + np.arange(self.partitions)[:, None] * self.per_partition
        size = min(self.window, self.per_partition)
        windows = np.arange(0, self.per_partition, size)  # the next one of the last is of another epoch, as large
        low, high = (np.searchsorted(starts, first + at, side="right") for at in (windows, windows + 2 * size - 1))
        groups_of = np.arange(0, self.partitions, -(-self.partitions // groups))
        worst = np.add.reduceat(total[high] - total[low - 1], groups_of, axis=0).max()
        return int(min(worst, weights.sum()))


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """Sample order of several sources, mixed by weight.

    Of the slots that a partition has had, a source has had its share to within one, and of a step's B slots to within
    a few. Each source goes through its own epochs: a partition that is through a source begins it anew.

    An id is sample + (samples of all sources) · (earlier passes over its source), with the samples of the sources one
    after the other. So no id comes twice in a run, and neither do the augmentation's draws.

    Args:
        plans: of the sources, all with one number of partitions.
        weights: of the sources, positive, in any unit.
        batch_size: samples of a global step, B.
        steps_per_epoch: steps that are called an epoch.
    """

    plans: tuple[SamplePlan, ...]
    weights: tuple[float, ...]
    batch_size: int
    steps_per_epoch: int

    @property
    def partitions(self) -> int:
        """Canonical partitions, P."""
        return self.plans[0].partitions

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard, those of the sources one after the other."""
        return tuple(n for plan in self.plans for n in plan.shard_samples)

    @cached_property
    def samples(self) -> int:
        """Samples of all sources."""
        return sum(plan.samples for plan in self.plans)

    @cached_property
    def _shares(self) -> tuple[int, ...]:
        return tuple(max(1, round(weight / sum(self.weights) * _SHARES)) for weight in self.weights)

    @cached_property
    def _first_ids(self) -> Ids:
        return _starts(np.asarray(self.shard_samples))

    @property
    def steps_per_window(self) -> int:
        """Steps in which no source goes through more than one window."""
        per_step = self.batch_size // self.partitions
        shares = zip(self.plans, self._shares, strict=True)
        sizes = ((min(plan.window, plan.per_partition), share) for plan, share in shares)
        return max(1, min(int(size * sum(self._shares) / share / per_step) for size, share in sizes))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Ids:
        """As `SamplePlan.batch`."""
        owned = owned_partitions(self.partitions, rank, world)
        per_step = self.batch_size // self.partitions
        slot = np.arange(step * per_step, (step + 1) * per_step)[None, :]
        source, position = turns(self._shares, self.partitions, np.asarray(owned)[:, None], slot)
        partition = np.broadcast_to(np.asarray(owned)[:, None], source.shape)
        ids = np.empty(source.shape, np.int64)
        first = 0
        for number, plan in enumerate(self.plans):
            epochs, taken = np.divmod(position, plan.per_partition)
            for epoch in np.unique(epochs[source == number]).tolist():
                mine = (source == number) & (epochs == epoch)
                ids[mine] = first + epoch * self.samples + plan.pick(owned, epoch, partition[mine], taken[mine])
            first += plan.samples
        return ids.ravel()

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """Turn ids into (shard number, row in the shard), with the shards of the sources one after the other."""
        ids = ids % self.samples
        shards = np.searchsorted(self._first_ids, ids, side="right") - 1
        return shards, ids - self._first_ids[shards]

    def most_open(self, weights: Ids, groups: int) -> int:
        """As `SamplePlan.most_open`."""
        parts = np.split(weights, np.cumsum([len(plan.shard_samples) for plan in self.plans])[:-1])
        return sum(plan.most_open(part, groups) for plan, part in zip(self.plans, parts, strict=True))


Plan = SamplePlan | MixturePlan


def turns(shares: tuple[int, ...], partitions: int, partition: Ids, slot: Ids) -> tuple[Ids, Ids]:
    """Say which source has a slot of a partition, and how many slots that source had there before.

    Of its first t slots, partition p gives ⌊t · w₀ + p/P⌋ to source 0, with w₀ its part of the shares, and divides the
    others in the same way among the other sources. Summed over partitions that is ⌊P · t · w₀⌋ (Hermite's identity).

    Args:
        shares: integer weights of the sources.
        partitions: P.
        partition: p; broadcasts with `slot`.
        slot: t, from 0.

    Returns:
        Source numbers and counts, of the shape of the two arrays together.
    """
    partition, left = np.broadcast_arrays(partition, slot)
    source, position = np.full(left.shape, -1), np.zeros(left.shape, np.int64)
    rest = sum(shares)
    for number, share in enumerate(shares):
        before, after = ((t * share * partitions + partition * rest) // (rest * partitions) for t in (left, left + 1))
        mine = (source < 0) & (after > before)
        source[mine], position[mine] = number, before[mine]
        left, rest = left - before, rest - share
    return source, position


def owned_partitions(partitions: int, rank: int, world: int) -> range:
    """Partitions that a rank owns; refuses a world that does not divide them."""
    if partitions % world:
        raise UserError(
            f"a world of {world} ranks does not divide the plan's {partitions} partitions: use a number of "
            "workers that divides them"
        )
    owned = partitions // world
    return range(rank * owned, (rank + 1) * owned)


def _starts(sizes: Ids) -> Ids:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])


@lru_cache(maxsize=16)
def _layout(plan: SamplePlan, epoch: int) -> _Layout:
    order = permutation(key(plan.seed, epoch, 1), len(plan.shard_samples))
    left_out = plan.samples % plan.partitions
    return _Layout(order, _starts(np.asarray(plan.shard_samples)[order]), epoch * left_out % plan.samples)


@lru_cache(maxsize=16)
def _window_order(key_: int, first: int, count: int, size: int) -> Ids:
    """Shuffled positions of one window, (count, size), for partitions `first` … `first + count − 1`."""
    keys = hash_numpy(key_, np.arange(first, first + count))
    return np.argsort(hash_numpy(0, keys[:, None] ^ np.arange(size, dtype=np.uint64)), axis=1, kind="stable")


def check_cache(plan: Plan, *, budget_bytes: float, shard_bytes: Ids, hosts: int) -> None:
    """Refuse a shard cache in which what a host's partitions open in a window and the next does not fit.

    Args:
        plan: of the training samples.
        budget_bytes: of a host's cache.
        shard_bytes: bytes of each shard, in the plan's order.
        hosts: hosts that the partitions are dealt to.
    """
    needed = plan.most_open(shard_bytes, hosts)
    if needed > budget_bytes:
        raise UserError(
            f"data.cache_gb={budget_bytes / 1e9:g} is less than the {needed / 1e9:.3g} GB of shards that "
            f"{-(-plan.partitions // hosts)} partitions of a host open in two windows: "
            "raise data.cache_gb, lower data.window or data.partitions, or write smaller shards"
        )
