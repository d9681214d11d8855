"""The driver of a run while MLflow is away, and when it is told to go."""

import json
import os
import signal

import pytest

from jobs import plan, train
from service import tracking
from service.data.store import Store
from service.tracking import TrackingAway
from tests.configs import tiny

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_retries(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(train, "STANDBY_SECONDS", 0.0)


def test_a_run_that_has_begun_goes_on_without_mlflow_and_a_new_one_does_not_begin(few_digits, tmp_path, capsys):
    made, run = plan.make(tiny(few_digits)), Store(tmp_path)
    with pytest.raises(TrackingAway, match="no MLflow at"):
        train._open_tracking(made, run, NOWHERE, "demo-1", "code")
    assert not run.exists(train.STATE)
    state = {"mlflow_run": "abc", "run": "demo-1"}
    run.put(train.STATE, json.dumps(state).encode())
    assert train._open_tracking(made, run, NOWHERE, "demo-1", "code") == state
    assert f"going on without MLflow: MLflow at {NOWHERE} failed" in capsys.readouterr().err


def test_the_end_of_a_run_waits_for_mlflow_up_to_a_deadline(monkeypatch):
    away = iter([NOWHERE, NOWHERE, None])

    def tell():
        uri = next(away)
        if uri is not None:
            tracking.finish(uri, "abc", "FINISHED")
        return "told"

    assert train._patiently(tell) == "told"
    monkeypatch.setattr(train, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(TrackingAway, match=NOWHERE):
        train._patiently(lambda: tracking.finish(NOWHERE, "abc", "FINISHED"))


def test_slurm_s_warning_asks_the_driver_to_stop():
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        assert train.main(["no-such-recipe"]) == 2  # having set its handlers
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
