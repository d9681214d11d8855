"""Sweeps on a real local stack: trials as runs, early ends, one name, a killed driver, a population."""

import json
import signal

import psutil
import pytest

from service.data.store import Store
from service.engine.goodput import FINISHED, read_events
from service.tracking import stored_metrics
from tests.configs import TINY
from tests.distributed.test_submit import wait_for_end, wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]
COLLAPSES, HEALTHY = (
    {"family.loss.std": 0.0, "family.loss.cov": 100.0},
    {"family.loss.std": 1.0, "family.loss.cov": 3.0},
)
SMALL = [*TINY, "schedule.epochs=48", "schedule.warmup_epochs=1", "eval.every=6 epochs", "monitor.every=5 steps"]
GRID = [
    "space.family.loss.std={kind: choice, values: [0.0, 1.0]}",
    "space.family.loss.cov={kind: choice, values: [3.0, 100.0]}",
    "scheduler.grace=0.2",
    "scheduler.reduction=2",
]


def kept(stack, name):
    return Store(stack.storage_uri).sub(name), json.loads(Store(stack.storage_uri).get(f"{name}/trials.json"))["trials"]


def finishes(stack, trial):
    """How often a trial's run has trained to its end."""
    events = read_events(Store(stack.storage_uri).sub(trial["run"]))
    return sum(event.get("outcome") == FINISHED for event in events)


def test_a_sweep_ends_what_collapses_and_finds_the_best(stack, tessera, few_digits, tmp_path):
    import mlflow

    command = ["tune", "demo", "name=four", f"data.uri={few_digits}", *SMALL, *GRID]
    planned = json.loads(tessera(*command, "--dry-run", "--json"))
    assert planned["state"] == "planned" and planned["trials"] == 4
    result = json.loads(tessera(*command, "--json").splitlines()[-1])
    run, trials = kept(stack, "four")
    assert len(trials) == 4 and {trial["state"] for trial in trials} <= {"finished", "collapsed", "stopped"}
    assert result["best"]["state"] == "finished" and result["default"]["point"] == HEALTHY
    collapsed = next(trial for trial in trials if trial["point"] == COLLAPSES)
    assert collapsed["state"] == "collapsed" and collapsed["percent"] < 100 and "below" in collapsed["why"]
    assert all(finishes(stack, trial) == (trial["state"] == "finished") for trial in trials)

    client = mlflow.MlflowClient(stack.mlflow_uri, stack.mlflow_uri)
    state = json.loads(run.get("state.json"))
    parent = client.get_run(state["mlflow_run"])
    assert parent.info.status == "FINISHED" and parent.data.params["search"] == "grid"
    pictures = {file.path for file in client.list_artifacts(parent.info.run_id, "pictures")}
    assert pictures == {f"pictures/{name}.png" for name in ("heat_map", "importance", "parallel")}
    of_sweep = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], of_sweep)
    assert {child.data.tags["run"] for child in children} == {trial["run"] for trial in trials}
    assert not client.search_registered_models()

    out = tmp_path / "out"
    report = tessera("tune", "report", "four", "--out", out)
    assert "best trial" in report and {file.name for file in out.iterdir()} == {
        "best.yaml",
        "heat_map.png",
        "importance.png",
        "parallel.png",
    }
    assert json.loads(tessera("submit", out / "best.yaml", "--dry-run", "--json"))["state"] == "planned"
    assert json.loads(tessera(*command, "--json").splitlines()[-1])["best"] == result["best"]
    refused = tessera(*command, "optim.lr=0.5", code=2)
    assert "base.optim.lr was 0.01, is 0.5" in refused and "name=four-2" in refused
    assert "concurrency=50" in tessera(*command, "concurrency=50", code=2)
    assert "no sweep 'nothing'" in tessera("tune", "report", "nothing", code=2)


def driver(name):
    """The driver process of a sweep's job."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        job = (process.info["environ"] or {}).get("TESSERA_JOB", "")
        if "jobs.tune" in (process.info["cmdline"] or []) and job.startswith(name):
            return process
    raise AssertionError(name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_loses_no_trial_and_repeats_none(stack, tessera, few_digits):
    command = ["tune", "demo", "name=killed", f"data.uri={few_digits}", *SMALL, *GRID]
    job = json.loads(tessera(*command, "--no-follow", "--json"))["job"]

    def over():
        store = Store(stack.storage_uri)
        trials = json.loads(store.get("killed/trials.json"))["trials"] if store.exists("killed/trials.json") else []
        return sum(trial["state"] in ("finished", "collapsed", "stopped") for trial in trials)

    wait_until(lambda: over() >= 1, 300)
    before = kept(stack, "killed")[1]
    driver("killed").send_signal(signal.SIGKILL)
    wait_for_end(stack, job)
    result = json.loads(tessera(*command, "--json").splitlines()[-1])
    run, trials = kept(stack, "killed")
    assert [trial["point"] for trial in trials][: len(before)] == [trial["point"] for trial in before]
    assert len(trials) == 4 and all(trial["state"] in ("finished", "collapsed", "stopped") for trial in trials)
    assert all(finishes(stack, trial) == (trial["state"] == "finished") for trial in trials)
    ended = {trial["run"]: trial["percent"] for trial in before if trial["state"] != "training"}
    assert all(trial["percent"] == ended[trial["run"]] for trial in trials if trial["run"] in ended)
    assert result["best"]["state"] == "finished" and job == "killed-01"
    listed = json.loads(tessera("jobs", "list", "--json"))["jobs"]
    assert next(each["job"] for each in listed if each["run"] == "killed") == "killed-02"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_population_clones_weights_and_goes_on_with_moved_settings(stack, tessera, few_digits):
    rates = "{kind: choice, values: [1.0e-6, 0.01]}"
    population = ["scheduler.kind=pbt", "scheduler.every=0.2", "scheduler.quantile=0.5", "search=random", "trials=2"]
    long = [*SMALL, "schedule.epochs=120"]  # a run is no further than what the trial has told of it
    command = ["tune", "demo", "name=two", f"data.uri={few_digits}", *long, *population, "map=null", "collapse=null"]
    result = json.loads(tessera(*command, f"space={{optim.lr: {rates}}}", "--json").splitlines()[-1])
    _, trials = kept(stack, "two")
    clones = [trial for trial in trials if trial["origin"]]
    assert result["states"] == {"finished": 2} and clones
    for clone in clones:
        run = Store(stack.storage_uri).sub(clone["run"])
        origin = json.loads(run.get("origin.json"))
        first = min(stored_metrics(run))
        assert origin["run"] == clone["origin"]["run"] and first == origin["step"] + 1 > 1
