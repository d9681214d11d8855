"""Where a run's time went, from events made by hand and by a leg."""

import io
import json
import time

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from jobs.cli import cli
from service import tracking
from service.data.store import Store, StoreUnavailable
from service.engine import goodput as module
from service.engine.goodput import Clock, Goodput, Leg, goodput, model, read_events, record
from service.tracking import Tracker


def event(leg, name, at, step=0, stepped=None, steps=0.0, start=1.0, **fields):
    seconds = {"start": start, "step": steps}
    stepped = at if stepped is None else stepped
    return {"leg": leg, "event": name, "time": 1000.0 + at, "step": step, "stepped": 1000.0 + stepped} | (
        {"seconds": seconds} | fields
    )


def steady(leg, began, restored, to, every=10, end=None):
    """A leg of one step a second after a second of start, with a checkpoint every ten, committed two seconds later."""
    events = [event(leg, "begin", began, start=0.0), event(leg, "restored", began + 1, restored)]
    events.append(event(leg, "first", began + 2, restored + 1, steps=1.0))
    for step in range(restored + every, to + 1, every):
        at = began + 1 + step - restored
        events.append(event(leg, "save", at, step, steps=step - restored, checkpoint=step, stall=0.25))
        if step + 2 <= to:
            events.append(event(leg, "commit", at + 2, step + 2, steps=step + 2 - restored, checkpoint=step))
    last = {"event": "end", "outcome": end} if end else {"event": "progress"}
    at = began + 1 + to - restored
    return [*events, event(leg, "", at, to, steps=to - restored) | last]


def lost(at, cause="SIGKILL"):
    return {"leg": 0, "event": "lost", "time": 1000.0 + at, "cause": cause}


def test_a_run_without_a_fault():
    found = goodput(steady(1, 0, 0, 40, end="finished"))
    assert (found.steps, found.lost_steps, found.restarts, found.outcome) == (40, 0, [], "finished")
    assert found.wall_seconds == 41 and found.seconds["step"] == 40 and found.goodput == pytest.approx(40 / 41)
    assert found.stalls == [0.25] * 4 and found.write_seconds == [2.0] * 3 and found.save_every_seconds == 10


def test_steps_taken_again_are_lost_and_the_time_between_legs_is_down():
    killed = steady(1, 0, 0, 25)  # at 26 s; resumes from step 20
    found = goodput([*killed, lost(27.5), *steady(2, 30, 20, 60, end="finished")])
    assert (found.steps, found.lost_steps) == (60, 5)
    assert found.wall_seconds == 71
    assert found.seconds == {"start": 2, "step": 60, "lost": 5, "down": 4}
    assert found.goodput == pytest.approx(60 / 71)
    [restart] = found.restarts
    assert (restart.cause, restart.step, restart.lost_steps) == ("SIGKILL", 20, 5)
    assert (restart.detect_seconds, restart.down_seconds) == (1.5, 6)


def test_a_fall_back_past_a_leg_loses_that_leg_too():
    """The second leg's checkpoints turn out to be damaged: the third goes on from the first leg's."""
    legs = steady(1, 0, 0, 25), steady(2, 30, 20, 45), steady(3, 60, 10, 30)
    found = goodput([each for leg in legs for each in leg])
    assert (found.steps, found.lost_steps) == (30, 15 + 25)
    assert found.seconds["step"] == 10 + 0 + 20
    assert [restart.lost_steps for restart in found.restarts] == [15, 25]
    assert [restart.cause for restart in found.restarts] == ["unknown", "unknown"]


def test_a_driver_that_comes_back_overlaps_and_counts_once():
    """The first leg goes on to step 45 while the second has taken over from step 20."""
    found = goodput([*steady(1, 0, 0, 45), *steady(2, 30, 20, 60, end="finished")])
    assert (found.steps, found.lost_steps) == (60, 25)
    assert found.seconds["step"] == 60 and found.seconds["down"] == 0
    assert found.wall_seconds == 71 and found.restarts[0].down_seconds == 0


def test_a_leg_that_ends_before_it_restores_changes_no_step():
    begun = [event(2, "begin", 27, start=0.0), event(2, "end", 28, outcome="StoreUnavailable")]
    found = goodput([*steady(1, 0, 0, 25), *begun, *steady(3, 30, 20, 60, end="finished")])
    assert (found.steps, found.lost_steps, found.seconds["step"]) == (60, 5, 60)
    assert [restart.cause for restart in found.restarts] == ["unknown", "StoreUnavailable"]


def test_what_a_dead_run_has_not_committed_is_lost_and_a_running_one_keeps_it():
    killed = steady(1, 0, 0, 25)
    running, stopped = goodput(killed), goodput(killed, alive=False)
    assert (running.steps, running.lost_steps, running.outcome) == (25, 0, "running")
    assert (stopped.steps, stopped.lost_steps, stopped.outcome) == (20, 5, "stopped")
    assert stopped.seconds["step"] == 20
    failed = goodput(steady(1, 0, 0, 25, end="TrainingFailed"))
    assert (failed.steps, failed.lost_steps, failed.outcome) == (20, 5, "TrainingFailed")
    waiting = goodput([*killed, event(2, "begin", 30, start=0.0)])
    assert (waiting.steps, waiting.lost_steps) == (20, 5)


def test_a_run_that_has_not_begun_has_no_goodput():
    with pytest.raises(ValueError, match="no leg"):
        goodput([lost(1)])


def test_the_model_of_a_larger_job():
    found = goodput([*steady(1, 0, 0, 25), lost(27.5), *steady(2, 30, 20, 60, end="finished")])
    expected = model(found, gpus=64, mtbf_hours=1.0)
    assert expected.every_seconds == 10 and expected.lost_per_failure == 6 + 5
    assert expected.goodput == pytest.approx((1 - 11 / 3600) * 10 / 10.25)
    assert expected.optimal_every_seconds == pytest.approx((2 * 0.25 * 3600) ** 0.5)
    assert expected.optimal_goodput > expected.goodput
    assert expected.gpu_hours_lost_a_day == pytest.approx(64 * 24 * (1 - expected.goodput))
    assert model(found, gpus=128, mtbf_hours=1.0).gpu_hours_lost_a_day == 2 * expected.gpu_hours_lost_a_day
    assert model(found, gpus=64, mtbf_hours=0.5).goodput < expected.goodput
    slow = goodput(steady(1, 0, 0, 25))
    assert model(slow, 1, 1e-4).optimal_every_seconds == 2.0  # no faster than a checkpoint is written
    assert model(goodput(steady(1, 0, 0, 9)), 64, 1.0) is None


def test_a_clock_divides_time_into_phases(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))
    clock = Clock()  # 0
    for _ in clock.steps([1, 2]):  # data 1, step 2, data 5
        with clock.phase("checkpoint"):  # 3 to 4
            pass
        clock.done(7)
    reading = clock.reading()
    assert reading["step"] == 7
    assert reading["seconds"] == {"start": 1, "data": 3, "step": 4, "checkpoint": 2}


def live(store, restored=0, steps=2):
    leg = Leg(store, Clock(), host="here", world=2)
    leg.restored(restored)
    for step in range(restored + 1, restored + steps + 1):
        leg.done(step)
    with leg.saving(restored + steps):
        pass
    leg.committed(restored + steps)
    leg.close("finished")


def test_legs_leave_their_events_in_the_storage(tmp_path):
    store = Store(tmp_path)
    live(store)
    record(store, {"event": "lost", "cause": "SIGKILL"})
    live(store, restored=2)
    events = read_events(store)
    names = ["begin", "restored", "first", "save", "commit", "end"]
    assert [each["event"] for each in events] == [*names, "lost", *names]
    assert [each["leg"] for each in events] == [1] * 6 + [0] + [2] * 6
    assert (events[0]["host"], events[0]["world"], events[5]["outcome"]) == ("here", 2, "finished")
    assert [each["step"] for each in events[1:6]] == [0, 1, 2, 2, 2]
    assert [each["checkpoint"] for each in events if "checkpoint" in each] == [2, 2, 4, 4]
    assert (goodput(events).steps, goodput(events).restarts[0].cause) == (4, "SIGKILL")


def test_a_long_leg_is_kept_in_several_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LINES", 4)
    store = Store(tmp_path)
    leg = Leg(store, Clock())
    for step in range(11):
        leg.committed(step)
        while not any(each.get("checkpoint") == step for each in read_events(store)):
            time.sleep(0.001)
    leg.close("finished")
    kept = [each["checkpoint"] for each in read_events(store) if each["event"] == "commit"]
    assert kept == list(range(11))
    assert len(store.list("events")) in (3, 4)  # four lines each, five where two came at once


def test_events_wait_while_storage_is_away(tmp_path, monkeypatch, caplog):
    class Away(Store):
        def list(self, prefix=""):
            raise StoreUnavailable("away")

        def put(self, name, data):
            raise StoreUnavailable("away")

    record(Away(tmp_path), {"event": "lost", "cause": "SIGKILL"})
    assert "SIGKILL" in caplog.text and "away" in caplog.text
    caplog.clear()
    monkeypatch.setattr(module, "_FLUSH_SECONDS", 0.01)
    store = Away(tmp_path)
    leg = Leg(store, Clock())
    while "events wait" not in caplog.text:
        time.sleep(0.01)
    leg.restored(3)
    store.__class__ = Store
    leg.close("finished")
    assert [each["event"] for each in read_events(store)] == ["begin", "restored", "end"]
    assert caplog.text.count("events wait") == 1


def test_a_full_disk_keeps_events_and_metrics_waiting_until_there_is_room(small_disk, monkeypatch, caplog):
    monkeypatch.setattr(module, "_FLUSH_SECONDS", 0.01)
    store = Store(small_disk / "run")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**19 - 2**14))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "rest").write_bytes(bytes(2**15))
    tracker, leg = Tracker(store, None, "run", flush_seconds=0.01), Leg(store, Clock())
    tracker.log(1, {"loss": 0.5})
    assert not tracker.flush(0.2)
    while "events wait for the run's storage" not in caplog.text:
        time.sleep(0.01)
    assert "metrics wait for the run's storage" in caplog.text and "No space left" in caplog.text
    filler.unlink()
    leg.close("finished")
    assert tracker.close(10) and tracking.stored_metrics(store) == {1: {"loss": 0.5}}
    assert [each["event"] for each in read_events(store)] == ["begin", "end"]


@pytest.fixture
def kept_run(tmp_path):
    store = Store(tmp_path / "runs/demo-1")
    for each in [*steady(1, 0, 0, 25), lost(27.5), *steady(2, 30, 20, 60, end="finished")]:
        name = f"{each['leg']:06d}-{round(1e3 * each['time'])}"
        with_others = store.get(f"events/{name}.jsonl") if store.exists(f"events/{name}.jsonl") else b""
        store.put(f"events/{name}.jsonl", with_others + json.dumps(each).encode() + b"\n")
    return store


def call(*arguments):
    result = CliRunner().invoke(cli, ["report", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    return result.output


def test_the_report_of_a_run(kept_run, tmp_path):
    text = call(tmp_path / "runs/demo-1")
    assert "goodput 84.5 % of 1:11 min, 60 steps, finished" in text
    assert "1 restart, 5 steps lost" in text and "SIGKILL" in text
    assert "64 GPUs with a failure every 1 h: each loses 11.0 s" in text
    picture = np.asarray(Image.open(io.BytesIO(kept_run.get("pictures/goodput.png"))).convert("RGB"))
    assert picture.shape == (500, 1200, 3) and (picture == (217, 95, 2)).all(-1).sum() > 100  # steps taken again


def test_the_report_for_programs(kept_run, tmp_path):
    row = json.loads(call(tmp_path / "runs/demo-1", "--json", "--gpus", 8, "--mtbf-hours", 2))
    found = goodput(read_events(kept_run))
    assert row["goodput"] == found.goodput and row["restarts"][0]["cause"] == "SIGKILL"
    assert {name: row[name] for name in Goodput.__dataclass_fields__} == json.loads(json.dumps(found.plain()))
    assert row["model"] == vars(model(found, 8, 2.0))


def test_the_report_of_a_killed_run_counts_what_is_committed(kept_run, tmp_path):
    for name in kept_run.list("events"):
        if name.startswith("events/000002"):
            kept_run.delete(name)
    assert "20 steps, stopped" in call(tmp_path / "runs/demo-1")


def test_a_report_needs_events(tmp_path):
    with pytest.raises(Exception, match="holds no events of a run"):
        call(tmp_path / "runs/none")
