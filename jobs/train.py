"""The driver of a run: `python -m jobs.train RECIPE [key=value …]`, submitted by `tessera submit` or plain Ray.

With `--plain` it trains in its own process, without Ray. It holds the run's lease, starts workers through Ray Train,
registers the encoder, and ends the MLflow run. Ray places, watches and restarts the workers; checkpoints and results go
through the run's own storage.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from datasets_prep.errors import UserError
from jobs import package, plan, recipes, report
from jobs.worker import Payload, WorkersFailed
from service import tracking
from service.config import Frozen, RunConfig
from service.data.store import Store, StoreUnavailable
from service.engine.goodput import goodput, read_events
from service.engine.lease import Lease, LeaseLost, RunAlive, check_lease, living_holder, newest_epoch

RESULT, STATE = "result.json", "state.json"
STANDBY_SECONDS = 5.0
PATIENCE_SECONDS = 300.0  # with MLflow, when all but telling it is done
T = TypeVar("T")


def main(arguments: list[str]) -> int:
    """Run the driver and return the job's exit code, as `exit_code` does."""
    plain, words = "--plain" in arguments, [word for word in arguments if word != "--plain"]
    if not words:
        print("usage: python -m jobs.train [--plain] RECIPE [key=value …]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGUSR1, _as_sigterm)

    def work() -> str:
        made = plan.make(recipes.load(words[0], words[1:]))
        how = fit_here if plain else fit_on_ray
        return summary_line(drive(made, storage_root(), os.environ.get("MLFLOW_TRACKING_URI"), how))

    return exit_code(work, "resumes the run")


def exit_code(work: Callable[[], str], again: str) -> int:
    """Do a driver's work, print what it returns, and give the exit code: 0 done, 1 failed, 2 bad input, 143 stopped.

    Args:
        work: of the driver; SIGTERM leaves it by an exception, so that a stopped job still ends its MLflow run.
        again: what the same command does after a failure.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it has found each key
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))
    try:
        print(work())
    except (StoreUnavailable, tracking.TrackingAway) as error:
        print(f"failed: {error}; the same command {again}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LeaseLost as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except WorkersFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 2 if error.user else 1
    return 0


def _as_sigterm(signum: int, frame: object) -> None:
    """Take Slurm's warning for what it means; its srun passes SIGUSR1 on, and kills at SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def storage_root() -> Store:
    """Root of all runs' storage, from `TESSERA_STORAGE`."""
    uri = os.environ.get("TESSERA_STORAGE")
    if not uri:
        raise UserError("TESSERA_STORAGE is not set: give it the folder or s3:// address that holds runs")
    return Store(uri)


def fit_on_ray(config: RunConfig, payload: Payload) -> None:
    """Train on Ray's workers."""
    from jobs import supervise  # Ray takes a second to import

    supervise.fit(config, payload)


def fit_here(config: RunConfig, payload: Payload) -> None:
    """Train in this process, with one worker.

    Raises:
        WorkersFailed: starting again would not help.
        SystemExit: the process was asked to stop, and the run has a checkpoint of the step at which it did.
    """
    from jobs.worker import GivenUp, Stopped, run_worker

    try:
        run_worker(vars(payload))
    except Stopped as stopped:
        print(f"stopped: {stopped}; the same command resumes the run", file=sys.stderr)
        sys.exit(143)
    except GivenUp as error:
        raise WorkersFailed(str(error), user=False) from error


def drive(
    made: plan.Plan,
    root: Store,
    tracking_uri: str | None,
    fit: Callable[[RunConfig, Payload], None] = fit_on_ray,
) -> dict[str, Any]:
    """Carry a run to its end, whichever part of that is still to do, and return its result."""
    if not tracking_uri:
        raise UserError("MLFLOW_TRACKING_URI is not set: give it the address of an MLflow server")
    code = package.code_hash()
    name = os.environ.get("TESSERA_RUN") or package.run_name(made.config, made.fingerprint, code)
    run = root.sub(name)
    print(f"run {name}", flush=True)
    lease = take_lease(run, is_finished)
    if lease is None:
        return json.loads(run.get(RESULT))
    with lease:
        state = _open_tracking(made, run, tracking_uri, name, code)
        payload = Payload(made.config.plain(), run.uri, lease.epoch, tracking_uri, state["mlflow_run"])
        try:
            if not run.exists(RESULT):
                fit(made.config, payload)
            result = json.loads(run.get(RESULT))
            check_lease(run, lease.epoch)
            result["mlflow_run"] = state["mlflow_run"]
            if made.config.eval.report:
                result |= _patiently(lambda: register(run, tracking_uri, state, made.config))
            _patiently(lambda: _draw(run, tracking_uri, state["mlflow_run"]))
            check_lease(run, lease.epoch)
        except BaseException as error:
            check_lease(run, lease.epoch)  # a driver that was replaced leaves the MLflow run to its successor
            end_tracking(tracking_uri, state["mlflow_run"], "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        run.put(RESULT, json.dumps(result, indent=1).encode())
        end_tracking(tracking_uri, state["mlflow_run"], "FINISHED")
    return result


def take_lease(run: Store, is_finished: Callable[[Store], bool]) -> Lease | None:
    """Take the run, waiting for a driver that has it and lives; None when that one finished it."""
    announced = False
    while True:
        try:
            return Lease(run, job=os.environ.get("TESSERA_JOB"))
        except RunAlive as alive:
            if not announced:
                print(f"attached: the run is {alive}; waiting for it", flush=True)
                announced = True
            time.sleep(STANDBY_SECONDS)
        if is_finished(run):
            return None


def is_finished(run: Store) -> bool:
    """Say whether a run has trained and, if it reports scores on the test split, its encoder is registered."""
    if not run.exists(RESULT):
        return False
    result = json.loads(run.get(RESULT))
    return "model_uri" in result or "reported_split" not in result


def _open_tracking(made: plan.Plan, run: Store, uri: str, name: str, code: str) -> dict[str, str]:
    tags = {
        "run": name,
        "recipe": made.config.name,
        "fingerprint": made.index.fingerprint,
        "package": code,
        "commit": package.commit() or "none",
        "archive": os.environ.get("TESSERA_PACKAGE") or "none",
        "steps": str(made.steps),
        "storage": run.uri,
    }
    if parent := os.environ.get("TESSERA_PARENT"):
        tags["mlflow.parentRunId"] = parent
    return open_tracking(run, uri, made.config.tracking.experiment, made.config, tags)


def open_tracking(run: Store, uri: str, experiment: str, config: Frozen, tags: dict[str, str]) -> dict[str, str]:
    """Create the MLflow run, or continue the one that an earlier driver of this run created."""
    if run.exists(STATE):
        state = json.loads(run.get(STATE))
        try:
            tracking.reopen(uri, state["mlflow_run"])
        except tracking.TrackingAway as error:  # what it should know waits in the run's storage
            print(f"warning: going on without MLflow: {error}", file=sys.stderr)
        return state
    tracking.check(uri)
    run_id = tracking.create_run(uri, experiment, tags["run"], config, tags)
    if patch := package.patch():
        run.put(package.PATCH_NAME, patch)
        tracking.log_text(uri, run_id, package.PATCH_NAME, patch.decode(errors="replace"))
    state = {"mlflow_run": run_id, **tags}
    run.put(STATE, json.dumps(state, indent=1).encode())
    return state


def _draw(run: Store, uri: str, run_id: str) -> None:
    """Keep pictures of the run's curves and of its wall time, in its storage and in MLflow."""
    from service import plots

    events = read_events(run)
    pictures = {
        "curves.png": plots.curves(tracking.stored_metrics(run)),
        "goodput.png": report.picture(events, goodput(events)),
    }
    for name, png in pictures.items():
        run.put(f"pictures/{name}", png)
        tracking.log_picture(uri, run_id, name, png)


def _patiently(tell: Callable[[], T]) -> T:
    """Tell MLflow something, again and again while it is away, up to a deadline."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return tell()
        except tracking.TrackingAway as error:
            if time.monotonic() > deadline:
                raise
            print(f"waiting for MLflow: {error}", file=sys.stderr, flush=True)
            time.sleep(STANDBY_SECONDS)


def outcome(run: Store, mlflow_run: str) -> Literal["FINISHED", "KILLED"] | None:
    """Say how a run that MLflow takes for running ended; None while a driver carries it on."""
    if living_holder(run, newest_epoch(run)) is not None:
        return None
    mine = run.exists(STATE) and json.loads(run.get(STATE))["mlflow_run"] == mlflow_run
    return "FINISHED" if mine and is_finished(run) else "KILLED"


def end_tracking(uri: str, run_id: str, status: Any) -> None:
    """End an MLflow run, or warn that it stays open."""
    try:
        tracking.finish(uri, run_id, status)
    except UserError as error:
        print(f"warning: the MLflow run stays open: {error}", file=sys.stderr)


def register(run: Store, tracking_uri: str, state: dict[str, str], config: RunConfig) -> dict[str, Any]:
    """Register a trained run's encoder and move `champion` if it is better; safe to repeat."""
    from service import export

    scores = json.loads(run.get("encoder/scores.json"))
    with tempfile.TemporaryDirectory(prefix="tessera-encoder-") as local:
        folder = Path(local)
        for name in run.list("encoder/"):
            (folder / name.removeprefix("encoder/")).write_bytes(run.get(name))
        export.export_program(folder)
        model = config.tracking.model or config.name
        tags = {key: state[key] for key in ("run", "fingerprint", "package", "commit", "recipe")}
        tags |= {key: scores[key] for key in ("val_linear", "val_linear_se", "protocol")}
        version = tracking.register_encoder(tracking_uri, state["mlflow_run"], model, folder, tags, requirements())
    moved, reason = tracking.move_champion(tracking_uri, model, version)
    print(f"champion {'moved' if moved else 'stays'}: {reason}", file=sys.stderr, flush=True)
    return {"model_uri": f"models:/{model}/{version}", "champion": moved}


def find_run(name: str, storage_uri: str) -> tuple[Store, dict[str, str]]:
    """Storage and MLflow identity of a run by name."""
    run = Store(storage_uri).sub(name)
    if not run.exists(STATE):
        raise UserError(f"no run {name!r} in {storage_uri}: `tessera jobs list` names the runs")
    return run, json.loads(run.get(STATE))


def register_again(name: str, storage_uri: str, tracking_uri: str) -> dict[str, Any]:
    """Register the encoder of a run that has trained, and end its MLflow run."""
    run, state = find_run(name, storage_uri)
    if not run.exists(RESULT):
        raise UserError(f"run {name!r} has not finished training: submit it again to resume it")
    result = json.loads(run.get(RESULT)) | {"mlflow_run": state["mlflow_run"]}
    config = RunConfig.model_validate_json(run.get("encoder/config.json"))
    if not config.eval.report:
        raise UserError(f"run {name!r} has no scores to register: submit it again with eval.report=true")
    with Lease(run):
        result |= register(run, tracking_uri, state, config)
        run.put(RESULT, json.dumps(result, indent=1).encode())
    tracking.finish(tracking_uri, state["mlflow_run"], "FINISHED")
    return result


def requirements() -> list[str]:
    """Packages, with the versions of this process, that loading a registered encoder takes."""
    from importlib.metadata import version

    return [
        f"{name}=={version(name).split('+')[0]}" for name in ("torch", "torchvision", "timm", "safetensors", "numpy")
    ]


def summary_line(result: dict[str, Any]) -> str:
    """One line that tells how a run ended."""
    if "reported_split" not in result:
        return f"finished {result['steps']} steps: linear probe {result['val_linear']:.2f} % on validation"
    trained = result["scores"]["trained"]
    return (
        f"finished {result['steps']} steps: linear probe {trained['all']:.2f} %, k-NN {trained['knn']:.2f} % on "
        f"{result['reported_split']}; encoder {result['model_uri']}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
