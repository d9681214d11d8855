"""Steps that are not taken in one process: what stays, what is told, when it ends the run; leaping losses."""

import logging

import pytest
import torch

from service.data.store import Store
from service.engine import alarms, loop
from service.engine.checkpoint import MARKER, Checkpoints
from service.engine.guard import Skips, TrainingFailed
from tests.configs import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def skips(store, history=None, start=0, **guard):
    config = tiny("none", **{f"guard__{name}": value for name, value in guard.items()})
    checkpoints = Checkpoints(store, config, {}, lambda: None, 0)
    return Skips(config, history or {}, start, checkpoints)


def skip(found, steps, scale=None, features=None):
    """Step at which the run ends, and why; None if it goes on."""
    features = features or {"projector": torch.zeros(2, 2, 4)}
    for step in steps:
        try:
            found.take(step, features, torch.tensor([step, 100 + step]), scale)
        except TrainingFailed as error:
            return step, str(error)
    return None


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "checkpoints")


def test_steps_in_a_row_end_a_run(store):
    assert skip(skips(store), [1, 2, 4, 5, 7, 8]) is None
    step, why = skip(skips(store), [1, 2, 4, 5, 6])
    assert step == 6 and "3 in a row, guard.max_skipped_in_a_row=3" in why
    assert "lower optim.lr (now 0.01)" in why and "the last good checkpoint is of step 0" in why
    assert skip(skips(store, max_skipped_in_a_row=1), [4])[0] == 4


def test_too_many_steps_since_the_newest_checkpoint_end_a_run(store):
    steps = range(2, 40, 2)
    step, why = skip(skips(store), steps)
    assert step == 20 and "10 since the last checkpoint, guard.max_skipped=10" in why
    assert skip(skips(store, max_skipped=2), steps)[0] == 4
    store.put(f"step-00000012-lease-0000/{MARKER}", b"{}")
    step, why = skip(skips(store), steps)
    assert step == 32 and "the last good checkpoint is of step 12" in why


def test_a_run_may_stop_at_the_first(store):
    step, why = skip(skips(store, nonfinite="stop"), [5])
    assert step == 5 and "guard.nonfinite=stop" in why


def test_what_was_skipped_is_told_and_counted_over_restarts(store, caplog):
    history = {4: {"skipped_steps": 2.0}, 6: {"loss": 0.1}, 9: {"skipped_steps": 7.0}}
    found = skips(store, history, start=8)
    assert found.count == 2
    with caplog.at_level(logging.WARNING):
        skip(found, [9])
    assert found.count == 3 and "step 9 is not taken, its gradient is not finite; samples [9, 109]" in caplog.text
    features = {"encoder": torch.zeros(2, 2, 3), "projector": torch.zeros(2, 2, 4)}
    features["projector"][1, 1, 2] = torch.nan
    skip(found, [11], features=features)
    assert "step 11 is not taken, its gradient is not finite; samples [111]" in caplog.text


def test_overflows_of_fp16_count_only_when_the_scale_is_no_excuse(store):
    found = skips(store)
    assert skip(found, range(1, 50), scale=1.0) is None and found.count == 0
    assert skip(found, range(50, 60), scale=0.5)[0] == 52 and found.count == 3


def poison(monkeypatch, steps):
    """Make the views of these steps, counted from 1, infinite where they enter the family."""
    place, taken = loop.place, 0

    def hook(family, arguments):
        nonlocal taken
        taken += 1
        batch = arguments[0]
        return (batch._replace(views=batch.views * (torch.inf if taken in steps else 1)),)

    def placed(*arguments):
        family = place(*arguments)
        family.register_forward_pre_hook(hook)
        return family

    monkeypatch.setattr(loop, "place", placed)


def run(config, folder, stop_at=None):
    rows = {}

    def take(step, row):
        rows.setdefault(step, {}).update(row)
        if step == stop_at:
            raise KeyboardInterrupt

    try:
        loop.train(config, loop.Run(Store(folder)), rows=take)
    except KeyboardInterrupt:
        pass
    return rows


def test_a_skipped_step_does_not_end_a_run(few_digits, tmp_path, monkeypatch, caplog):
    config = tiny(few_digits, schedule__steps=5, monitor__every="1 steps")
    poison(monkeypatch, {2})
    rows = run(config, tmp_path, stop_at=4)
    assert [rows[step]["skipped_steps"] for step in (1, 2, 3, 4)] == [0, 1, 1, 1]
    finite = [torch.isfinite(torch.tensor(rows[step]["loss"])).item() for step in (1, 2, 3)]
    assert finite == [True, False, True]
    assert "monitor/encoder/rankme" in rows[1] and "monitor/encoder/rankme" not in rows[2]
    assert "step 2 is not taken" in caplog.text


def test_a_run_that_stays_infinite_ends_with_a_cure(few_digits, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 99))
    with pytest.raises(TrainingFailed, match="gradient of step 4 is not finite .3 in a row.*lower optim.lr"):
        run(tiny(few_digits, schedule__steps=9), tmp_path)


def test_a_leap_of_the_loss_may_end_a_run(few_digits, tmp_path, monkeypatch):
    """With a bound near zero, the first loss above the median of those before it is a leap."""
    monkeypatch.setattr(alarms, "_SPIKE_LOSSES", (3, 100))
    options = {"guard__spike_deviations": 1e-9, "schedule__warmup_epochs": 0, "schedule__steps": 9, "optim__lr": 1.0}
    options |= {"checkpoint__every": "1 steps", "monitor__every": "null"}
    told = run(tiny(few_digits, **options), tmp_path / "alarm", stop_at=8)
    first = min(step for step, row in told.items() if row.get("alarm/spike") == 1.0)
    with pytest.raises(TrainingFailed, match=f"alarm spike at step {first}: loss .*; the last good checkpoint is of"):
        run(tiny(few_digits, **options, guard__spike="stop"), tmp_path / "stop")
