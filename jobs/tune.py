"""The driver of a sweep: `python -m jobs.tune SWEEP [key=value …]`, submitted by `tessera tune` or plain Ray.

Ray Tune decides which points are tried and which trials end early; each trial is an ordinary run below the sweep's
folder (`jobs.trial`). What happened is kept there, in `trials.json`, not in Tune's own files: a driver that takes over
tells a fresh Tune the same points in the same order, and every trial reports what its run has stored before it goes on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from datasets_prep.errors import UserError
from jobs import package, plan, sensitivity, sweep
from jobs.plan import check_resources
from jobs.supervise import GRACE_SECONDS, free_placement_groups
from jobs.train import RESULT, end_tracking, exit_code, open_tracking, outcome, storage_root, take_lease
from jobs.trial import Given, Trial
from jobs.tune_submit import ENTRYPOINT, TRIALS, check_same, identity, keep, unpacked
from service import tracking
from service.config import RunConfig
from service.data.store import Store
from service.engine.lease import ask_to_stop, check_lease, living_holder, newest_epoch

ENDED = ("finished", "collapsed", "stopped")
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # of Tune's own state, which nobody reads
    "RAY_AIR_NEW_OUTPUT": "0",
}
_PASSED_ON = (
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "MLFLOW_TRACKING_URI",
    "TESSERA_STORAGE",
    "TESSERA_PACKAGE",
    "TESSERA_JOB",
)  # from the driver to the runs
_DOMAINS: Mapping[str, Callable[[Any], Any]] = {
    "uniform": lambda values: tune.uniform(values.low, values.high),
    "loguniform": lambda values: tune.loguniform(values.low, values.high),
    "quniform": lambda values: tune.quniform(values.low, values.high, values.step),
    "randint": lambda values: tune.randint(values.low, values.high + 1),
    "choice": lambda values: tune.choice([json.dumps(value) for value in values.values]),
}


def main(arguments: list[str]) -> int:
    """Run the driver and return the job's exit code: 0 done, 1 failed, 2 bad input."""
    if not arguments:
        print("usage: python -m jobs.tune SWEEP [key=value …]", file=sys.stderr)
        return 2

    def work() -> str:
        settings, base = read(arguments[0], arguments[1:])
        result = drive(settings, plan.make(base), storage_root(), os.environ.get("MLFLOW_TRACKING_URI"))
        return sensitivity.summary_line(result)

    return exit_code(work, "goes on")


def read(name: str, overrides: list[str]) -> tuple[sweep.Sweep, RunConfig]:
    """A sweep by name or path, or one that `tessera tune` has packed with its config."""
    return unpacked(Path(name).read_text()) if name.endswith(".json") else sweep.load(name, overrides)


def drive(settings: sweep.Sweep, made: plan.Plan, root: Store, tracking_uri: str | None) -> dict[str, Any]:
    """Carry a sweep to its end, whatever part of it is still to do, and return its result."""
    if not tracking_uri:
        raise UserError("MLFLOW_TRACKING_URI is not set: give it the address of an MLflow server")
    run, mine = root.sub(settings.name), identity(settings, made, package.code_hash())
    check_same(run, mine)
    print(f"sweep {settings.name}", flush=True)
    lease = take_lease(run, lambda run: run.exists(RESULT))
    with lease or nullcontext():
        check_same(run, mine)  # while the lease was waited for, another may have taken the name
        if lease is None or run.exists(RESULT):
            return json.loads(run.get(RESULT))
        keep(run, settings, made.config, mine)
        tags = {"run": settings.name, "recipe": made.config.name, "fingerprint": made.fingerprint}
        tags |= {"package": mine["code"], "commit": package.commit() or "none", "storage": run.uri}
        tags |= {
            "archive": os.environ.get("TESSERA_PACKAGE") or "none",
            "sweep": settings.name,
            "entrypoint": ENTRYPOINT,
        }
        state = open_tracking(run, tracking_uri, made.config.tracking.experiment, settings, tags)
        try:
            ledger = Ledger(run, settings, lease.epoch)
            fit(settings, made, root, ledger, {"TESSERA_PARENT": state["mlflow_run"]})
            check_lease(run, lease.epoch)
            result = sensitivity.conclude(settings, made.config, ledger.entries)
            result |= {"sweep": settings.name, "mlflow_run": state["mlflow_run"]}
            run.put(sensitivity.BEST, sensitivity.recipe(settings, result["best"]["point"]).encode())
            for name, png in sensitivity.pictures(settings, ledger.entries).items():
                run.put(f"pictures/{name}", png)
                tracking.log_picture(tracking_uri, state["mlflow_run"], name, png)
        except BaseException as error:
            check_lease(run, lease.epoch)
            end_tracking(tracking_uri, state["mlflow_run"], "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        run.put(RESULT, json.dumps(result, indent=1).encode())
        end_tracking(tracking_uri, state["mlflow_run"], "FINISHED")
        tracking.reconcile(tracking_uri, root.uri, outcome)
    return result


class Ledger(tune.Callback):
    """What happened to each trial, kept in the sweep's folder; the newest life of a trial counts."""

    def __init__(self, run: Store, settings: sweep.Sweep, lease_epoch: int) -> None:
        self._run, self._settings, self._epoch = run, settings, lease_epoch
        kept: dict[str, Any] = {"seconds": 0.0, "trials": []}
        if run.exists(TRIALS):
            kept = json.loads(run.get(TRIALS))
        self.entries: list[dict[str, Any]] = kept["trials"]
        self._spent, self._began = kept["seconds"], time.monotonic()
        self.total = 0
        self.frozen = False

    @property
    def seconds(self) -> float:
        """Wall time of all drivers so far."""
        return self._spent + time.monotonic() - self._began

    @property
    def ended(self) -> dict[str, str]:
        """How runs ended that need not be taken up again, by name."""
        return {entry["run"]: entry["state"] for entry in self.entries if entry["state"] in ENDED}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune before a trial does anything."""
        number = trials.index(trial)
        if number >= len(self.entries) or "point" not in self.entries[number]:
            point = sweep.decoded(self._settings, trial.config["trial"]["point"])
            self._keep(number, {"point": point, "state": "training"})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Tune with what a trial reports."""
        number = trials.index(trial)
        if self.entries[number]["state"] in ENDED:
            return  # it reports again what it did under an earlier driver
        point = sweep.decoded(self._settings, result["point"])  # of a trial that is about to be replaced, the old one
        chosen = {name: result[name] for name in self._settings.metrics}
        kept = {name: result[name] for name in ("run", "state", "why", "origin", "step", "percent", "seconds")}
        monitored = {name: value for name, value in result.items() if name.startswith("monitor/")}
        self._keep(number, {"point": point, **kept, "metrics": chosen | monitored})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when a trial has ended, by itself or by the scheduler."""
        number = trials.index(trial)
        if self.entries[number]["state"] == "training":
            self._keep(number, {"state": "stopped"})

    def _keep(self, number: int, changed: dict[str, Any]) -> None:
        if self.frozen:
            return
        while len(self.entries) <= number:
            self.entries.append({"number": len(self.entries), "state": "waiting"})
        self.entries[number] = self.entries[number] | changed
        check_lease(self._run, self._epoch)
        self._run.put(TRIALS, json.dumps({"seconds": self.seconds, "trials": self.entries}, indent=1).encode())
        print(sensitivity.line(self.entries[number], self._settings, self._progress()), flush=True)

    def _progress(self) -> str:
        over = sum(entry["state"] in (*ENDED, "failed") for entry in self.entries)
        left = self.seconds / over * (self.total - over) if over else 0.0
        return f"{over} of {self.total} trials over" + (f", ETA {left / 60:.0f} min" if over and left else "")


def fit(settings: sweep.Sweep, made: plan.Plan, root: Store, ledger: Ledger, environment: dict[str, str]) -> None:
    """Let Tune run the trials that are left; returns when all have ended."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses its own files of results, which nobody asked for
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    for group in free_placement_groups():
        print(f"freed placement group {group}, left behind by a job that has ended", flush=True)
    there = ray.cluster_resources()
    room = sweep.check_room(settings, made.config, there.get("CPU", 0), there.get("GPU", 0))
    ledger.total = sweep.trial_count(settings, made.config)
    print(f"{ledger.total} trials, {room} at once", flush=True)
    environment |= {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    own = _own_process(settings, made.config, there.get("GPU", 0))
    given = Given(settings.plain(), made.config.plain(), root.uri, environment, bool(own), ledger.ended)
    here = tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001, **own}])
    with tempfile.TemporaryDirectory(prefix="tessera-tune-") as scratch:  # Tune wants a place; nothing there is read
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, given=given), here),
            param_space={"trial": _space(settings, made.config, ledger)},
            tune_config=_tune_config(settings, made.config, ledger, room),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                callbacks=[ledger],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=3),  # of the actors that watch runs
            ),
        )
        with _stopping_gently(root.sub(settings.name), ledger):
            tuner.fit()


def _own_process(settings: sweep.Sweep, base: RunConfig, gpus: float) -> dict[str, float]:
    """What a trial reserves to train in a process of its own: one worker on the only node needs no group of workers."""
    if len(ray.nodes()) > 1 or base.parallel.workers > 1 or any(key.startswith("parallel.") for key in settings.space):
        return {}
    gpu = check_resources(base, base.parallel.cpus_per_worker, gpus)
    return {"CPU": base.parallel.cpus_per_worker} | ({"GPU": 1.0} if gpu else {})


def _space(settings: sweep.Sweep, base: RunConfig, ledger: Ledger) -> Any:
    """Trials in order, those of an earlier driver as they are now; of Optuna the distributions."""
    if settings.search == "optuna":
        return {"point": {key: _DOMAINS[values.kind](values) for key, values in settings.space.items()}}
    points = sweep.points(settings, base)
    members: list[dict[str, Any]] = [{"point": sweep.encoded(settings, point)} for point in points]
    for number, entry in enumerate(ledger.entries):
        if "point" in entry:
            members[number] = {"point": sweep.encoded(settings, entry["point"]), "origin": entry.get("origin")}
    return tune.grid_search(members)


def _tune_config(settings: sweep.Sweep, base: RunConfig, ledger: Ledger, room: int) -> tune.TuneConfig:
    (metric, mode), *others = settings.metrics.items()
    left = None if settings.minutes is None else max(1.0, 60 * settings.minutes - ledger.seconds)
    searched = settings.search == "optuna"
    return tune.TuneConfig(
        metric=None if others else metric,
        mode=None if others else mode,
        search_alg=_optuna(settings, base, ledger) if searched else None,
        scheduler=_scheduler(settings),
        num_samples=settings.trials or 1 if searched else 1,
        max_concurrent_trials=room,
        time_budget_s=left,
    )


def _optuna(settings: sweep.Sweep, base: RunConfig, ledger: Ledger) -> Searcher:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried = [entry["point"] for entry in ledger.entries if "point" in entry]
    known = tried or sweep.points(settings, base)
    first = [{f"trial/point/{key}": value for key, value in sweep.encoded(settings, each).items()} for each in known]
    several = {"metric": list(settings.metrics), "mode": list(settings.metrics.values())}
    return OptunaSearch(
        points_to_evaluate=first or None,
        seed=settings.sweep_seed + len(tried),  # a fresh sampler of the same seed would draw the same points again
        **(several if len(settings.metrics) > 1 else {}),  # pyright: ignore[reportArgumentType]
    )


def _scheduler(settings: sweep.Sweep) -> TrialScheduler | None:
    rule = settings.scheduler
    if isinstance(rule, sweep.Asha):
        return AsyncHyperBandScheduler(
            time_attr="percent",
            max_t=100,
            grace_period=100 * rule.grace,  # pyright: ignore[reportArgumentType]
            reduction_factor=rule.reduction,
            stop_last_trials=False,
        )
    if isinstance(rule, sweep.Pbt):
        return PopulationBasedTraining(
            time_attr="percent",
            perturbation_interval=100 * rule.every,
            hyperparam_mutations={"trial": {"point": {k: _moves(values) for k, values in settings.space.items()}}},
            quantile_fraction=rule.quantile,
            resample_probability=rule.resample,
            custom_explore_fn=partial(_within, settings),
        )
    return None


def _within(settings: sweep.Sweep, config: dict[str, Any]) -> dict[str, Any]:
    trial = config["trial"]
    return {**config, "trial": {**trial, "point": sweep.clipped(settings, trial["point"])}}


def _moves(values: sweep.Distribution) -> Any:
    return (
        [json.dumps(value) for value in values.values]
        if isinstance(values, sweep.Choice)
        else _DOMAINS[values.kind](values)
    )


@contextmanager
def _stopping_gently(run: Store, ledger: Ledger) -> Generator[None]:
    """Answer SIGTERM by a last checkpoint of every trial's run, then leave; the same command goes on."""

    def leave(signum: int, frame: object) -> None:
        ledger.frozen = True
        living = living_trials(run)
        for trial, epoch in living.items():
            ask_to_stop(trial, epoch)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(living_holder(trial, epoch) for trial, epoch in living.items()):
            time.sleep(0.5)
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def living_trials(run: Store) -> dict[Store, int]:
    """Runs of a sweep's trials that somebody trains, by their leases, each with its epoch."""
    trials = {name.partition("/lease/")[0] for name in run.list() if "/lease/" in name}
    newest = {trial: newest_epoch(trial) for trial in map(run.sub, sorted(trials))}
    return {trial: epoch for trial, epoch in newest.items() if living_holder(trial, epoch)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
