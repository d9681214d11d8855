import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_prep.errors import UserError
from service.config import canonical_partitions
from service.data.plan import SamplePlan, check_cache, locate

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
        opened = [p.epoch_shards(3, rank, world) for rank in range(world)]
        assert max(len(shards) for shards in opened) <= 32 // world + 1
        for rank, shards in enumerate(opened):
            used, _ = locate(p.shard_samples, epoch_ids(p, 3, rank, world))
            assert set(used.tolist()) <= set(shards)


def test_order_is_pinned():
    assert plan().batch(0)[:6].tolist() == [351, 315, 335, 340, 406, 409]


def test_locate_inverts_ids():
    shards, rows = locate(SHARDS, np.array([0, 312, 313, 612, 613, 1166]))
    assert shards.tolist() == [0, 0, 1, 1, 2, 3]
    assert rows.tolist() == [0, 312, 0, 299, 0, 303]


def test_partitions_are_lowered_until_they_divide():
    assert [canonical_partitions(64, b) for b in (256, 96, 7, 1000)] == [64, 48, 7, 50]


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="world of 3 ranks does not divide the plan's 16 partitions"):
        plan().batch(0, 0, 3)


def test_a_cache_that_would_thrash_is_refused():
    p = plan(shard_samples=(100,) * 64)
    check_cache(p, budget_bytes=32 * 10, shard_bytes=10, hosts=1)
    with pytest.raises(UserError, match="raise data.cache_gb"):
        check_cache(p, budget_bytes=31 * 10, shard_bytes=10, hosts=1)
    check_cache(p, budget_bytes=16 * 10, shard_bytes=10, hosts=2)
