import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datasets_prep.errors import UserError
from service.config import canonical_partitions
from service.data.plan import MixturePlan, SamplePlan, check_cache, turns

SHARDS = (313, 300, 250, 304)


def plan(**changes):
    options = {"shard_samples": SHARDS, "batch_size": 64, "partitions": 16, "window": 50, "seed": 1}
    return SamplePlan(**options | changes)


def epoch_ids(p, epoch, rank=0, world=1):
    first = epoch * p.steps_per_epoch
    return np.concatenate([p.batch(first + s, rank, world) for s in range(p.steps_per_epoch)])


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    per_partition=st.integers(1, 5),
    partitions=st.integers(1, 24),
    window=st.integers(1, 100),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 50),
)
def test_an_epoch_takes_no_sample_twice_and_leaves_only_the_tail(
    shards, per_partition, partitions, window, seed, epoch
):
    batch = per_partition * partitions
    if sum(shards) // partitions < per_partition:
        with pytest.raises(UserError, match="lower data.batch_size"):
            SamplePlan(tuple(shards), batch, partitions, window, seed)
        return
    p = SamplePlan(tuple(shards), batch, partitions, window, seed)
    ids = epoch_ids(p, epoch)
    assert len(ids) == len(set(ids.tolist())) == p.steps_per_epoch * batch
    assert 0 <= ids.min() and ids.max() < sum(shards)
    assert sum(shards) - len(ids) < batch + partitions


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_world_sees_the_same_global_batches(world):
    p = plan()
    for step in range(2 * p.steps_per_epoch + 1):
        slices = [p.batch(step, rank, world) for rank in range(world)]
        assert {len(s) for s in slices} == {64 // world}
        np.testing.assert_array_equal(np.concatenate(slices), p.batch(step))


def test_epochs_differ_and_the_remainder_rotates():
    p = plan()
    left_out = [set(range(p.samples)) - set(epoch_ids(p, e).tolist()) for e in range(12)]
    assert all(a != b for a, b in zip(left_out, left_out[1:], strict=False))
    assert set().union(*map(set, [epoch_ids(p, e).tolist() for e in range(3)])) == set(range(p.samples))
    assert not np.array_equal(epoch_ids(p, 0), epoch_ids(p, 1))
    assert not np.array_equal(epoch_ids(p, 0), epoch_ids(plan(seed=2), 0))


def test_every_sample_is_taken_about_equally_often():
    p = plan(shard_samples=(1003,))
    counts = np.zeros(p.samples, int)
    for e in range(60):
        counts[epoch_ids(p, e)] += 1
    expected = 60 * p.steps_per_epoch * p.batch_size / p.samples
    assert abs(counts.mean() - expected) < 1e-9
    assert counts.min() > 0.6 * expected


def test_a_rank_opens_only_its_own_shards():
    p = plan(shard_samples=(100,) * 32)
    for world in (2, 4):
        opened = [np.unique(p.locate(epoch_ids(p, 3, rank, world))[0]) for rank in range(world)]
        assert max(len(shards) for shards in opened) <= 32 // world + 1


def test_order_is_pinned():
    assert plan().batch(0)[:6].tolist() == [351, 315, 335, 340, 406, 409]


def test_locate_inverts_ids():
    shards, rows = plan().locate(np.array([0, 312, 313, 612, 613, 1166]))
    assert shards.tolist() == [0, 0, 1, 1, 2, 3]
    assert rows.tolist() == [0, 312, 0, 299, 0, 303]


def test_partitions_are_lowered_until_they_divide():
    assert [canonical_partitions(64, b) for b in (256, 96, 7, 1000)] == [64, 48, 7, 50]


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="world of 3 ranks does not divide the plan's 16 partitions"):
        plan().batch(0, 0, 3)


def opened_in_two_windows(p, group, groups):
    """Shards that a group's partitions touch in each window of epoch 0 and the next, counted sample by sample."""
    steps = p.steps_per_window
    ids = [p.batch(step, group, groups) for step in range(p.steps_per_epoch)]
    spans = (np.concatenate(ids[first : first + 2 * steps]) for first in range(0, p.steps_per_epoch, steps))
    return max(len(np.unique(p.locate(span)[0])) for span in spans)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_cache_that_would_thrash_is_refused(groups):
    p = plan(shard_samples=(30,) * 400, window=48)
    most = max(opened_in_two_windows(p, group, groups) for group in range(groups))
    size = np.full(400, 10)
    assert most <= p.most_open(size, groups) / 10 <= 1.2 * most
    check_cache(p, budget_bytes=p.most_open(size, groups), shard_bytes=size, hosts=groups)
    with pytest.raises(UserError, match="raise data.cache_gb, lower data.window"):
        check_cache(p, budget_bytes=p.most_open(size, groups) - 1, shard_bytes=size, hosts=groups)


def test_imagenet_in_64_mb_shards_fits_the_default_cache():
    samples = 1_281_167
    per_shard = 64_000_000 // 112_000
    shards = (per_shard,) * (samples // per_shard)
    p = SamplePlan(shards, 256, 64, window=per_shard, seed=0)
    check_cache(p, budget_bytes=20e9, shard_bytes=np.full(len(shards), 64_000_000), hosts=1)


def test_a_plan_of_14_million_samples_is_light(capsys):
    tracemalloc.start()
    began = time.perf_counter()
    p = SamplePlan((933,) * 15_000, 4096, 64, window=933, seed=0)
    p.most_open(np.full(15_000, 64_000_000), 1)
    ids = p.batch(3 * p.steps_per_epoch // 2)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with capsys.disabled():
        print(f" [{p.samples:,} samples: {seconds:.2f} s, {peak / 1e6:.0f} MB]", end="")
    assert len(set(ids.tolist())) == 4096 and peak < 500e6


def mixture(weights=(0.7, 0.3), batch_size=64, sizes=((313, 300, 250, 304), (100, 41)), partitions=16, seed=1):
    plans = tuple(SamplePlan(shards, partitions, partitions, 50, seed + i) for i, shards in enumerate(sizes))
    return MixturePlan(plans, weights, batch_size, 40)


@settings(max_examples=40, deadline=None)
@example(weights=[4.0, 3.0, 2.0, 4.0], partitions=19, per_step=1)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    partitions=st.integers(1, 24),
    per_step=st.integers(1, 5),
)
def test_every_source_of_a_mixture_has_its_share_of_slots(weights, partitions, per_step):
    shares = tuple(round(weight * 1000) for weight in weights)
    steps = 60
    source, position = turns(shares, partitions, np.arange(partitions)[:, None], np.arange(steps * per_step)[None, :])
    for number, share in enumerate(shares):
        mine = source == number
        part = share / sum(shares)
        np.testing.assert_array_equal(position[mine], (np.cumsum(mine, 1) - mine)[mine])
        in_partition = np.cumsum(mine, 1) - part * np.arange(1, mine.shape[1] + 1)
        assert np.abs(in_partition).max() < len(shares) + 1e-6
        in_steps = np.cumsum(mine.reshape(partitions, steps, per_step).sum((0, 2)))
        # Each source adds Σ_p |⌊x + p/P⌋ − x| ≤ (P + 1)/2 at most, however long the run.
        bound = len(shares) * (partitions + 1) / 2
        assert np.abs(in_steps - part * partitions * per_step * np.arange(1, steps + 1)).max() <= bound


def test_a_mixture_covers_each_source_epoch_by_epoch_and_repeats_no_id():
    p = mixture()
    ids = np.concatenate([p.batch(step) for step in range(200)])
    assert len(set(ids.tolist())) == len(ids)
    first = p.plans[0].samples
    for plan_, low in zip(p.plans, (0, first), strict=True):
        mine = ids[(ids % p.samples >= low) & (ids % p.samples < low + plan_.samples)]
        passes = mine // p.samples
        for epoch in range(passes.min(), passes.max() - 1):
            assert (passes == epoch).sum() == plan_.per_partition * plan_.partitions
    small = ids[ids % p.samples >= first]
    assert len(small) / len(ids) == pytest.approx(0.3, abs=1e-3) and small.max() // p.samples > 20


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_world_sees_the_same_mixture(world):
    p, again = mixture(weights=(3, 2)), mixture(weights=(6, 4))
    for step in (0, 1, 7, 100_000):
        parts = [p.batch(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {64 // world}
        np.testing.assert_array_equal(np.concatenate(parts), again.batch(step))


def test_a_mixture_locates_its_samples():
    p = mixture()
    shards, rows = p.locate(np.array([0, 1166, 1167, 1266, 1267, 1308 * 5 + 1307, 1308]))
    assert shards.tolist() == [0, 3, 4, 4, 5, 5, 0]
    assert rows.tolist() == [0, 303, 0, 99, 0, 40, 0]


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(1, 60), min_size=1, max_size=10),
    per_partition=st.integers(1, 4),
    partitions=st.sampled_from([1, 2, 4, 8, 24]),
    window=st.integers(1, 80),
    seed=st.integers(0, 2**31 - 1),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    resumed=st.integers(0, 10**6),
)
def test_worlds_agree_and_resuming_anywhere_continues_the_same_order(
    shards, per_partition, partitions, window, seed, world, resumed
):
    if sum(shards) // partitions < per_partition or partitions % world:
        return
    p, again = (SamplePlan(tuple(shards), per_partition * partitions, partitions, window, seed) for _ in range(2))
    step = resumed % (3 * p.steps_per_epoch)
    for at in range(step, step + 3):
        parts = [again.batch(at, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), p.batch(at))
        assert {len(part) for part in parts} == {p.batch_size // world}
