"""The driver of a run: `python -m jobs.train RECIPE [key=value …]`, submitted by `tessera submit` or plain Ray.

It holds the run's lease, starts the workers through Ray Train, registers the encoder, and ends the MLflow run. Ray
places, watches and restarts the workers; checkpoints and results go through the run's own storage.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_prep.errors import UserError
from jobs import package, plan, recipes
from service.config import RunConfig
from service.data.store import Store, StoreUnavailable
from service.engine.lease import Lease, LeaseLost, RunAlive, check_lease

RESULT, STATE = "result.json", "state.json"
STANDBY_SECONDS = 5.0
FLUSH_SECONDS = 30.0
_OF_LINE = ("epoch", "lr", "weight_decay", "momentum", "images_per_s")  # not among the losses of a progress line


@dataclass(frozen=True)
class Payload:
    """What a worker is told; plain values, so that Ray can carry it."""

    config: dict[str, Any]
    storage: str
    lease_epoch: int
    tracking_uri: str
    mlflow_run: str


def main(arguments: list[str]) -> int:
    """Run the driver and return the job's exit code: 0 done, 1 failed, 2 bad input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments:
        print("usage: python -m jobs.train RECIPE [key=value …]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    try:
        made = plan.make(recipes.load(arguments[0], arguments[1:]))
        result = drive(made, storage_root(), os.environ.get("MLFLOW_TRACKING_URI"))
    except StoreUnavailable as error:
        print(f"failed: {error}; the same command resumes the run", file=sys.stderr)
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
    print(summary_line(result))
    return 0


def _stop(signum: int, frame: object) -> None:
    """Leave by an exception, so that a stopped job still ends its MLflow run."""
    sys.exit(143)


def storage_root() -> Store:
    """Root of all runs' storage, from `TESSERA_STORAGE`."""
    uri = os.environ.get("TESSERA_STORAGE")
    if not uri:
        raise UserError("TESSERA_STORAGE is not set: give it the folder or s3:// address that holds runs")
    return Store(uri)


def drive(made: plan.Plan, root: Store, tracking_uri: str | None) -> dict[str, Any]:
    """Carry a run to its end, whichever part of that is still to do, and return its result."""
    from service import tracking

    if not tracking_uri:
        raise UserError("MLFLOW_TRACKING_URI is not set: give it the address of an MLflow server")
    code = package.code_hash()
    name = package.run_name(made.config, made.fingerprint, code)
    run = root.sub(name)
    print(f"run {name}", flush=True)
    lease = _take_lease(run)
    if lease is None:
        return json.loads(run.get(RESULT))
    with lease:
        tracking.check(tracking_uri)
        state = _open_tracking(made, run, tracking_uri, name, code)
        payload = Payload(made.config.plain(), run.uri, lease.epoch, tracking_uri, state["mlflow_run"])
        try:
            if not run.exists(RESULT):
                fit(made.config, payload)
            result = json.loads(run.get(RESULT))
            check_lease(run, lease.epoch)
            result |= register(run, tracking_uri, state, made.config)
            _draw(run, tracking_uri, state["mlflow_run"])
            check_lease(run, lease.epoch)
        except BaseException as error:
            check_lease(run, lease.epoch)  # a driver that was replaced leaves the MLflow run to its successor
            _end_tracking(tracking_uri, state["mlflow_run"], "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        run.put(RESULT, json.dumps(result, indent=1).encode())
        _end_tracking(tracking_uri, state["mlflow_run"], "FINISHED")
    return result


def _take_lease(run: Store) -> Lease | None:
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
    """Say whether a run has trained and its encoder is registered."""
    return run.exists(RESULT) and "model_uri" in json.loads(run.get(RESULT))


def _open_tracking(made: plan.Plan, run: Store, uri: str, name: str, code: str) -> dict[str, str]:
    """Create the MLflow run, or continue the one that an earlier driver of this run created."""
    from service import tracking

    if run.exists(STATE):
        state = json.loads(run.get(STATE))
        tracking.reopen(uri, state["mlflow_run"])
        return state
    tags = {
        "run": name,
        "recipe": made.config.name,
        "fingerprint": made.index.fingerprint,
        "package": code,
        "commit": os.environ.get("TESSERA_COMMIT") or package.commit() or "none",
        "storage": run.uri,
    }
    run_id = tracking.create_run(uri, made.config.tracking.experiment, name, made.config, tags)
    state = {"mlflow_run": run_id, **tags}
    run.put(STATE, json.dumps(state, indent=1).encode())
    return state


def _draw(run: Store, uri: str, run_id: str) -> None:
    """Keep the run's curves as a picture, in its storage and in MLflow."""
    from service import plots, tracking

    png = plots.curves(tracking.stored_metrics(run))
    run.put("pictures/curves.png", png)
    tracking.log_picture(uri, run_id, "curves.png", png)


def _end_tracking(uri: str, run_id: str, status: Any) -> None:
    from service import tracking

    try:
        tracking.finish(uri, run_id, status)
    except UserError as error:
        print(f"warning: the MLflow run stays open: {error}", file=sys.stderr)


class WorkersFailed(RuntimeError):
    """Training failed in the workers; `user` tells whether bad input was the cause."""

    def __init__(self, message: str, user: bool) -> None:
        super().__init__(message)
        self.user = user


def fit(config: RunConfig, payload: Payload) -> None:
    """Train on Ray's workers; returns when all have ended well."""
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRun
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # else every line of a worker shows twice
    if not ray.is_initialized():
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    there = ray.cluster_resources()
    gpu = plan.check_resources(config, there.get("CPU", 0), there.get("GPU", 0))
    resources = {"CPU": config.parallel.cpus_per_worker} | ({"GPU": 1.0} if gpu else {})
    with tempfile.TemporaryDirectory(prefix="tessera-ray-") as scratch:  # Ray wants a place; nothing of ours goes there
        trainer = TorchTrainer(
            run_worker,
            train_loop_config=vars(payload),
            scaling_config=ScalingConfig(
                num_workers=config.parallel.workers, use_gpu=gpu, resources_per_worker=resources
            ),
            run_config=RayRun(
                storage_path=scratch, failure_config=FailureConfig(max_failures=config.parallel.max_restarts)
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            failures = list(getattr(error, "worker_failures", {}).values())
            raise WorkersFailed(str(failures[0] if failures else error), any(map(_is_user_error, failures))) from error


def _is_user_error(error: BaseException) -> bool:
    """Say whether bad input was the cause, which an outage of the storage is not."""
    root = getattr(error, "cause", None) or error
    return isinstance(root, UserError) and not isinstance(root, StoreUnavailable)


def run_worker(payload: dict[str, Any]) -> None:
    """Train in one worker process, under Ray Train or torchrun alike."""
    from service.engine.loop import Run, train
    from service.tracking import Tracker

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    told = Payload(**payload)
    config = RunConfig.model_validate(told.config)
    run = Run(Store(told.storage), told.lease_epoch)
    if int(os.environ.get("RANK", 0)) != 0:
        train(config, run)
        return
    tracker = Tracker(run.store, told.tracking_uri, told.mlflow_run)
    try:
        train(config, run, rows=progress(tracker.log), flush=lambda: tracker.flush(FLUSH_SECONDS))
    finally:
        tracker.close()


def progress(log: Callable[[int, dict[str, float]], None]) -> Callable[[int, dict[str, float]], None]:
    """Pass rows on, and print one as a line every few seconds."""
    printed = 0.0

    def take(step: int, row: dict[str, float]) -> None:
        nonlocal printed
        eta = row.pop("eta_s", None)
        log(step, row)
        if "val_linear" in row:
            print(
                f"step {step:>6}  validation probe {row['val_linear']:.2f} ± {row['val_linear_se']:.2f} %", flush=True
            )
        elif eta is not None and (time.monotonic() - printed > 2 or eta == 0):
            printed = time.monotonic()
            terms = "  ".join(f"{name} {row[name]:.4g}" for name in row if name not in _OF_LINE)
            print(
                f"step {step:>6}  epoch {row['epoch']:.1f}  {terms}  lr {row['lr']:.2g}  "
                f"{row['images_per_s']:.0f} images/s  ETA {eta // 60:.0f}:{eta % 60:02.0f}",
                flush=True,
            )

    return take


def register(run: Store, tracking_uri: str, state: dict[str, str], config: RunConfig) -> dict[str, Any]:
    """Register a trained run's encoder and move `champion` if it is better; safe to repeat."""
    from service import export, tracking

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
    return {"model_uri": f"models:/{model}/{version}", "champion": moved, "mlflow_run": state["mlflow_run"]}


def find_run(name: str, storage_uri: str) -> tuple[Store, dict[str, str]]:
    """Storage and MLflow identity of a run by name."""
    run = Store(storage_uri).sub(name)
    if not run.exists(STATE):
        raise UserError(f"no run {name!r} in {storage_uri}: `tessera jobs list` names the runs")
    return run, json.loads(run.get(STATE))


def register_again(name: str, storage_uri: str, tracking_uri: str) -> dict[str, Any]:
    """Register the encoder of a run that has trained, and end its MLflow run."""
    from service import tracking

    run, state = find_run(name, storage_uri)
    if not run.exists(RESULT):
        raise UserError(f"run {name!r} has not finished training: submit it again to resume it")
    result = json.loads(run.get(RESULT))
    config = RunConfig.model_validate_json(run.get("encoder/config.json"))
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
    trained = result["scores"]["trained"]
    return (
        f"finished {result['steps']} steps: linear probe {trained['all']:.2f} %, k-NN {trained['knn']:.2f} % on "
        f"{result['reported_split']}; encoder {result['model_uri']}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
