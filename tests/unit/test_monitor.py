"""Measurements during training, on real data: what they hold, what they change, and a collapse that is noticed."""

import json
import logging

import pytest
import torch

from service.data.store import Store
from service.engine import loop
from service.engine.monitor import Monitor
from service.evaluate import quality
from service.tracking import Tracker, stored_metrics
from tests.configs import tiny

SHORT = {
    "data__batch_size": 32,
    "data__augment__jitter": 0,  # colours would drown the trend of so few steps
    "family__encoder__depth": 8,
    "schedule__steps": 30,
    "schedule__warmup_epochs": 0,
    "monitor__every": "5 steps",
    "monitor__rows": 64,
    "monitor__patience": 2,
    "monitor__max_correlation": 1,
}
COLLAPSE = {**SHORT, "family__loss__std": 0, "family__loss__cov": 0}


class Killed(BaseException):
    """Stands for a death between two steps."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(config, folder, until=None):
    """Train with rows in the run's storage; `until` kills the process after that step, before any evaluation."""
    rows = {}
    tracker = Tracker(Store(folder), None, "run")

    def take(step, row):
        if until is not None and step > until:
            raise Killed
        rows.setdefault(step, {}).update(row)
        tracker.log(step, row)

    result = None
    try:
        result = loop.train(config, loop.Run(Store(folder)), take, lambda: tracker.flush(10))
    except Killed:
        pass
    finally:
        tracker.close()
    return rows, result


def measured(rows):
    return [step for step, row in rows.items() if "monitor/grad_norm" in row]


def alarmed(rows):
    return {step: row["alarm/collapse"] for step, row in rows.items() if "alarm/collapse" in row}


def test_a_healthy_run_is_left_alone(few_digits, tmp_path, caplog):
    rows, result = run(tiny(few_digits, **SHORT, eval__probe_c=1e-3), tmp_path)
    assert measured(rows) == [5, 10, 15, 20, 25, 30]
    assert "alarm" not in caplog.text and result["alarms"] == {}
    assert not any(name.startswith("alarm/") for row in rows.values() for name in row)
    assert json.loads(Store(tmp_path).get("result.json"))["alarms"] == {}


def test_a_collapse_is_told_once_however_often_the_run_dies(few_digits, tmp_path, caplog):
    config = tiny(few_digits, **COLLAPSE, checkpoint__every="6 steps", checkpoint__keep_last=9)
    whole, _ = run(config, tmp_path / "whole", until=25)
    [[begin, began]] = alarmed(whole).items()
    [told] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert began == 1 and f"alarm collapse at step {begin}: projector has variance" in told
    assert "raise family.loss.std (now 0.0)" in told
    assert whole[25]["monitor/projector/variance"] < 0.01 < whole[25]["monitor/encoder/variance"]
    caplog.clear()
    for until in (begin, begin + 6, 25):  # the first time before the next checkpoint
        run(config, tmp_path / "cut", until)
    assert caplog.text.count("alarm collapse") == 1 and caplog.text.count("resumed") == 2
    stored = stored_metrics(Store(tmp_path / "cut"))
    assert measured(stored) == measured(whole) and alarmed(stored) == alarmed(whole)
    assert monitored(stored) == monitored(whole)


def test_measurements_change_no_training(few_digits, tmp_path):
    config = {**SHORT, "schedule__steps": 7, "compute__deterministic": True}
    try:
        plain, _ = run(tiny(few_digits, **{**config, "monitor__every": "null"}), tmp_path / "a", until=6)
        watched, _ = run(tiny(few_digits, **{**config, "monitor__every": "3 steps"}), tmp_path / "b", until=6)
    finally:
        torch.use_deterministic_algorithms(False)
    assert measured(plain) == [] and measured(watched) == [3, 6]
    assert [row["loss"] for row in plain.values()] == [row["loss"] for row in watched.values()]
    for name in ("encoder/rankme", "projector/lidar", "projector/alignment", "encoder/std_min", "weight_norm"):
        assert watched[6][f"monitor/{name}"] > 0, name


def test_a_collapsed_run_can_stop_itself(few_digits, tmp_path):
    config = tiny(
        few_digits,
        **COLLAPSE,
        monitor__stop_on_collapse=True,
        checkpoint__every="4 steps",
        checkpoint__keep_last=9,
    )
    with pytest.raises(loop.TrainingFailed, match=r"variance .*raise family.loss.std.*good checkpoint is of step") as e:
        run(config, tmp_path / "kept")
    named = int(str(e.value).split()[-1])
    assert named in (4, 8) and named in [int(n.split("-")[1]) for n in Store(tmp_path / "kept").list("checkpoints")]
    with pytest.raises(loop.TrainingFailed, match="alarm collapse"):  # started again, it does not train on
        run(config, tmp_path / "kept")
    sparse = config.model_copy(update={"checkpoint": tiny().checkpoint})
    with pytest.raises(loop.TrainingFailed, match="no checkpoint from before it is kept"):
        run(sparse, tmp_path / "none")


def test_the_norm_of_the_gradient_is_that_before_clipping(few_digits, tmp_path):
    config = {**SHORT, "monitor__every": "1 steps"}
    plain, _ = run(tiny(few_digits, **config), tmp_path / "plain", until=1)
    clipped, _ = run(tiny(few_digits, **config, optim__clip_norm=1e-6), tmp_path / "clipped", until=1)
    norms = [rows[1]["monitor/grad_norm"] for rows in (plain, clipped)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 1e-3


def monitored(rows):
    return {step: {k: v for k, v in row.items() if k.startswith("monitor/")} for step, row in rows.items()}


def collected(features, world, *, rows, batch, steps):
    """Rows of each rank's window, added up as a measurement adds them."""
    config = tiny(data__batch_size=batch, monitor__rows=rows)
    total = 0
    for rank in range(world):
        monitor = Monitor(config, rank, world, steps, steps)
        for done in range(1, steps + 1):
            part = features[done - 1].chunk(world, 1)[rank]
            monitor.collect(done, {"encoder": part})
        total = total + torch.cat(monitor._window["encoder"], 1)
    return total


@pytest.mark.parametrize(("rows", "batch"), [(16, 64), (64, 16), (6, 8), (40, 16), (2, 32)])
@pytest.mark.parametrize("views", [1, 2])
def test_any_number_of_ranks_measures_the_same_bounded_rows(rows, batch, views):
    steps = 5
    features = torch.randn(steps, views, batch, 3, dtype=torch.float64)
    whole = collected(features, 1, rows=rows, batch=batch, steps=steps)
    assert whole.shape[0] * whole.shape[1] <= max(rows, views * min(steps, -(-rows // batch)))
    assert whole.shape[0] * whole.shape[1] >= rows / 2
    flat = features.transpose(0, 1).flatten(1, 2)
    assert all((row == flat[0]).all(1).any() for row in whole[0])
    assert len(whole[0].unique(dim=0)) == whole.shape[1]
    for world in (2, 4, 8):
        if batch % world == 0:
            assert torch.equal(collected(features, world, rows=rows, batch=batch, steps=steps), whole)


def test_a_window_that_a_restart_cut_short_measures_nothing():
    config = tiny(data__batch_size=4, monitor__rows=8)
    module = torch.nn.Linear(2, 2)
    x = torch.randn(1, 4, 2)
    for first, complete in ((1, True), (9, True), (10, False)):
        monitor = Monitor(config, 0, 1, 10, 100)
        for done in range(first, 11):
            monitor.collect(done, {"encoder": x})
        row = monitor.read(module, torch.tensor(3.0))
        assert ("monitor/encoder/rankme" in row) == complete
        assert row["monitor/weight_norm"] == pytest.approx(
            sum(p.norm() ** 2 for p in module.parameters()).sqrt().item()
        )
        assert row["monitor/grad_norm"] == 3
    assert monitor.due(10) and not monitor.due(15) and monitor.due(100)


def test_a_measurement_is_the_report_of_the_rows():
    config = tiny(data__batch_size=16, monitor__rows=32)
    x = torch.randn(2, 16, 5)
    monitor = Monitor(config, 0, 1, 1, 1)
    monitor.collect(1, {"level1": x})
    got = monitor.read(torch.nn.Linear(1, 1), torch.tensor(3.0))
    assert {f"monitor/level1/{k}": v for k, v in quality.report(x).items()}.items() <= got.items()
    assert got["monitor/grad_norm"] == 3
