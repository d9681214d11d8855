"""Checkpoints on S3 that fails: by an outage, by errors in between, by an object that is lost."""

import random

import pytest

from service.collectives import rank
from service.data.store import Store
from service.engine import checkpoint
from tests.distributed.test_checkpoints_of_ranks import differing, make_state, opened, take_steps, whole
from tests.ranks import on_ranks
from tests.servers import faulty_proxy

pytestmark = pytest.mark.distributed


class Faults:
    """Fails while `away`, and at other times the given share of requests."""

    def __init__(self, share=0.0):
        self.away, self.share, self.draw, self.failed = False, share, random.Random(0), 0

    def __call__(self, method, path):
        if not (self.away or self.draw.random() < self.share):
            return None
        self.failed += 1
        return 503


def restored(uri):
    state = make_state("ddp", seed=9)
    return opened(uri).restore(state), whole(state)


def test_an_outage_delays_a_commit_and_loses_none(s3, monkeypatch, caplog):
    faults = Faults()
    with faulty_proxy(s3, faults) as proxy:
        for name, value in proxy.env().items():
            monkeypatch.setenv(name, value)
        store, state = Store("s3://data/outage", deadline=0.5), make_state("ddp", seed=1)
        checkpoints = opened(None, store)
        checkpoints.save(1, state)
        checkpoints.wait()
        faults.away = True
        take_steps(state)
        expected = whole(state)
        checkpoints.save(2, state)
        take_steps(state)
        while "step 2 is not written yet" not in caplog.text:
            checkpoints._superseded.wait(0.05)
        faults.away = False
        checkpoints.wait()
        assert [name.split("-")[1] for name in checkpoint.committed(store)] == ["00000001", "00000002"]
        step, found = restored("s3://data/outage")
        assert step == 2 and differing(expected, found) == []
        newest = checkpoint.committed(store)[-1]
        store.delete(next(name for name in store.list(newest) if name.endswith(".distcp")))
        assert restored("s3://data/outage")[0] == 1
        assert "is missing): removed, falling back to the one before" in caplog.text


def save_shards(uri, environment, steps):
    """Save a checkpoint after each step, of sharded state; returns what each should read as."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        state, written = make_state("fsdp", seed=1), []
        checkpoints = opened(uri, keep_last=steps)
        for step in range(1, steps + 1):
            written.append(whole(state))
            checkpoints.save(step, state)
            take_steps(state)
        checkpoints.settle()
    return written if rank() == 0 else None


def test_errors_of_storage_in_between_change_nothing(s3, s3_env):
    faults = Faults(share=0.2)
    with faulty_proxy(s3, faults) as proxy:
        written, _ = on_ranks(2, save_shards, "s3://data/errors", proxy.env(), 6)
    assert faults.failed > 0
    s3_env()
    store = Store("s3://data/errors")
    folders = checkpoint.committed(store)
    assert len(folders) == 6
    for folder, expected in zip(folders, written, strict=True):
        state = make_state("ddp", seed=9)
        loaded = state.plain()
        checkpoint.read(store, folder, loaded)
        state.restore(loaded)
        assert differing(expected, whole(state)) == []
