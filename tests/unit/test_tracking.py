"""Metrics reach the run's storage off the training thread, whatever fails; nothing here needs a server."""

from __future__ import annotations

import json
import math
import time

import pytest

from datasets_prep.errors import UserError
from service import tracking
from service.data.store import Store, StoreUnavailable
from service.tracking import Tracker


def rows(store: Store) -> list[tuple[int, dict[str, float]]]:
    lines = [line for name in store.list("metrics") for line in store.get(name).splitlines()]
    return [(row["step"], row["metrics"]) for row in map(json.loads, lines)]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


def test_rows_are_stored_in_order_and_in_bounded_chunks(store, monkeypatch):
    monkeypatch.setattr(tracking, "_CHUNK_ROWS", 4)
    tracker = Tracker(store, None, "run", flush_seconds=0.01)
    for step in range(11):
        tracker.log(step, {"loss": step / 2})
        time.sleep(0.004)
    assert tracker.close(10)
    assert rows(store) == [(step, {"loss": step / 2}) for step in range(11)]
    assert store.list("metrics") == [f"metrics/000001-00000{number}.jsonl" for number in range(3)]


def test_a_later_session_comes_after_and_keeps_what_is_there(store):
    for session in range(3):
        tracker = Tracker(store, None, "run")
        tracker.log(session, {"loss": 1.0})
        assert tracker.close(10)
    assert [step for step, _ in rows(store)] == [0, 1, 2]


def test_two_writers_at_once_do_not_share_an_object(store):
    trackers = [Tracker(store, None, "run", flush_seconds=0.001) for _ in range(4)]
    for number, tracker in enumerate(trackers):
        tracker.log(number, {"loss": 1.0})
    assert all(tracker.close(10) for tracker in trackers)
    assert sorted(step for step, _ in rows(store)) == [0, 1, 2, 3]


def test_flush_makes_rows_safe_from_a_crash(store):
    tracker = Tracker(store, None, "run", flush_seconds=3600)
    tracker.log(1, {"loss": 0.5})
    assert rows(store) == []
    assert tracker.flush(10)
    assert rows(store) == [(1, {"loss": 0.5})]
    tracker.close(10)


def test_values_that_are_no_numbers_survive(store):
    tracker = Tracker(store, None, "run")
    tracker.log(1, {"nan": math.nan, "inf": math.inf})
    tracker.close(10)
    ((_, metrics),) = rows(store)
    assert math.isnan(metrics["nan"]) and metrics["inf"] == math.inf


class Flaky(Store):
    """Takes no writes until it is mended, and takes its time to say so."""

    broken = True

    def put(self, name, data):
        if self.broken:
            time.sleep(0.2)
            raise StoreUnavailable("s3://runs: away")
        super().put(name, data)


def test_training_neither_waits_for_a_failing_storage_nor_loses_rows(tmp_path):
    store = Flaky(tmp_path / "run")
    tracker = Tracker(store, None, "run", flush_seconds=0.01)
    slowest = 0.0
    for step in range(100):
        begin = time.perf_counter()
        tracker.log(step, {"loss": 1.0})
        slowest = max(slowest, time.perf_counter() - begin)
        time.sleep(0.002)
    assert slowest < 0.1
    assert not tracker.flush(0.05)
    store.broken = False
    assert tracker.close(10)
    assert [step for step, _ in rows(store)] == list(range(100))


def test_close_says_when_rows_are_left(tmp_path):
    tracker = Tracker(Flaky(tmp_path / "run"), None, "run")
    tracker.log(1, {"loss": 1.0})
    assert not tracker.close(10)


def test_leaves_have_dotted_names_and_text_values():
    tree = {"optim": {"kind": "lars", "lr": 0.5, "clip": None}, "eval": {"labels": [1, 5]}, "on": True}
    assert dict(tracking.leaves(tree)) == {
        "optim.kind": "lars",
        "optim.lr": "0.5",
        "optim.clip": "null",
        "eval.labels": "[1, 5]",
        "on": "true",
    }


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_a_folder_is_no_tracking_server(uri):
    with pytest.raises(UserError, match="keeps runs in a database"):
        tracking.check(uri)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "http://192.0.2.77:5000"])
def test_an_absent_server_is_reported_within_seconds(uri):
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"no MLflow at {uri}.*tessera up"):
        tracking.check(uri)
    assert time.monotonic() - begin < 6


@pytest.mark.parametrize("uri", ["runs:/abc/model", "models:/name", "models:/@champion", "name@champion"])
def test_an_encoder_is_addressed_through_the_registry(uri):
    with pytest.raises(UserError, match="models:/NAME@ALIAS or models:/NAME/VERSION"):
        tracking.model_info("http://127.0.0.1:9", uri)
