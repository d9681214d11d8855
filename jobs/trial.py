"""One trial of a sweep as Ray Tune sees it: it starts an ordinary run, watches its rows, and ends it.

The run is a process of its own, `python -m jobs.train`, with its own lease, storage, MLflow run and workers. A
trial that is started again, after its driver died or was moved, finds what the run has stored and goes on from there.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from datasets_prep.errors import UserError
from jobs import package, plan, sweep
from jobs.train import RESULT
from service import tracking
from service.config import RunConfig
from service.data.store import NotFound, Store
from service.engine import MARKER

LOOK_SECONDS = 1.0  # between looks at a run's rows
STOP_SECONDS = 60.0  # for the last checkpoint of a stopped run
CLONES = 5  # attempts to copy a checkpoint that its run removes meanwhile
ORIGIN = "origin.json"
_ROOT = Path(__file__).resolve().parent.parent
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Given:
    """What all trials of a sweep share; plain values, so that Ray can carry it.

    Args:
        sweep: the sweep's settings.
        base: config that trials start from.
        storage: root of all runs' storage.
        environment: of the runs' processes: addresses, the sweep's MLflow run.
        plain: runs train in their own process, with what the trial has reserved, and not on Ray's workers.
        ended: how the trials that ended did, by run.
    """

    sweep: dict[str, Any]
    base: dict[str, Any]
    storage: str
    environment: dict[str, str]
    plain: bool
    ended: dict[str, str]


@dataclass(frozen=True)
class Origin:
    """The run, and its step, whose checkpoint another run starts from, or the next if that one is gone."""

    run: str
    step: int


class Trial(tune.Trainable):
    """Tune's side of a trial; `config["trial"]` has a `point` and, of a clone that goes on, its `origin`."""

    def setup(self, config: dict[str, Any], given: Given) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by Tune on a new actor."""
        self._given = given
        self._sweep = sweep.Sweep.model_validate(given.sweep)
        self._base = RunConfig.model_validate(given.base)
        origin = config["trial"].get("origin")
        self._take(config["trial"]["point"], Origin(**origin) if origin else None)
        if self._sweep.scheduler.kind == "pbt":  # an earlier driver has acted on all probes but the newest
            self._told = max(0, len(self._probes()) - (self._run not in given.ended))

    def _take(self, point: dict[str, Any], origin: Origin | None) -> None:
        config = sweep.trial_config(self._sweep, self._base, sweep.decoded(self._sweep, point))
        self._made = plan.make(config)
        self._point, self._origin = point, origin
        self._run = run_name(self._sweep, self._made, origin)
        self._store = Store(self._given.storage).sub(self._run)
        self._told = 0
        self._process: subprocess.Popen[bytes] | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the run's next probe, its end or its collapse, and report it; the last probe together with the end.

        Otherwise a population could exchange a member that has nothing left to train.
        """
        ended = self._given.ended.get(self._run)
        while True:
            rows = tracking.stored_metrics(self._store)
            found = sweep.reports(rows, self._made.steps, self._made.config.data.batch_size)
            seen = None if ended else sweep.collapsed(rows, self._sweep.collapse, self._warmup)
            if not seen and len(found) > self._told and found[self._told]["percent"] < 100:
                self._told += 1
                return self._report(found[self._told - 1], "training")
            state, why = ("collapsed", seen) if seen else (ended, None) if ended else self._carry_on()
            if state is not None:
                self.cleanup()
                found = self._probes()  # the last may have come with the end
                return self._report(found[-1] if found else self._nothing(rows), state, why) | {"done": True}
            time.sleep(LOOK_SECONDS)

    @property
    def _warmup(self) -> int:
        return round(self._made.config.schedule.warmup_epochs * self._made.steps_per_epoch)

    def _report(self, row: dict[str, float], state: str, seen: str | None = None) -> dict[str, Any]:
        origin = vars(self._origin) if self._origin else None
        return {**row, "run": self._run, "state": state, "why": seen or "", "origin": origin, "point": self._point}

    def _nothing(self, rows: dict[int, Any]) -> dict[str, float]:
        """What a run reports that ended before its first probe: the worst there is."""
        worst = {name: float("-inf" if mode == "max" else "inf") for name, mode in self._sweep.metrics.items()}
        step = max(rows, default=0)
        return {**worst, "step": step, "percent": 100 * step / self._made.steps, "seconds": 0.0}

    def _carry_on(self) -> tuple[str | None, str | None]:
        """Start the run if nobody has; say how it ended, and why it failed, or None while it goes on."""
        if self._process is None:
            if self._store.exists(RESULT):
                return "finished", None
            self._start()
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return None, None
        if not self._store.exists(RESULT):
            return "failed", f"exit code {code}: {_last_line(self._log)}"
        untold = [probe for probe in self._probes()[self._told :] if probe["percent"] < 100]
        return None if untold else "finished", None

    def _probes(self) -> list[dict[str, float]]:
        rows = tracking.stored_metrics(self._store)
        return sweep.reports(rows, self._made.steps, self._made.config.data.batch_size)

    def _start(self) -> None:
        if self._origin is not None and not self._store.exists(ORIGIN):
            clone(Store(self._given.storage), self._origin, self._store)
        folder = Path(tempfile.mkdtemp(prefix="tessera-trial-"))
        self._log = folder / "log.txt"
        (folder / "run.json").write_text(json.dumps(self._made.config.plain()))
        environment = {**os.environ, **self._given.environment, "TESSERA_RUN": self._run, "PYTHONUNBUFFERED": "1"}
        if not self._given.plain:
            for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
                environment.pop(name, None)  # of this actor, not of the run's workers
        command = ["jobs.train", *(["--plain"] if self._given.plain else []), str(folder / "run.json")]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=_ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,  # noqa: PLW1509
            )

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Name what a clone would go on from, once it is there; the weights stay in the run's storage."""
        step = sweep.reports(tracking.stored_metrics(self._store), self._made.steps, 1)[self._told - 1]["step"]
        while (
            all(at < step for at, _ in _checkpoints(self._store))
            and self._process is not None
            and self._process.poll() is None
        ):
            time.sleep(LOOK_SECONDS)
        return {"run": self._run, "step": int(step)}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from another run's newest checkpoint, or from where the own run was paused."""
        if checkpoint is None:
            return
        if checkpoint["run"] != self._run:
            self._take(self.config["trial"]["point"], Origin(checkpoint["run"], checkpoint["step"]))
        else:
            self._told = sum(probe["step"] <= checkpoint["step"] for probe in self._probes())

    def cleanup(self) -> None:
        """Stop the run with a checkpoint; called by Tune when it stops the trial."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def run_name(settings: sweep.Sweep, made: plan.Plan, origin: Origin | None) -> str:
    """Name of a trial's run below the sweep: the same point, from the same origin, is the same run."""
    source = made.fingerprint if origin is None else f"{made.fingerprint} {origin.run} {origin.step}"
    return f"{settings.name}/{package.run_name(made.config, source, package.code_hash())}"


def clone(root: Store, origin: Origin, into: Store) -> int:
    """Copy the checkpoint that an origin names into another run, its marker last; returns its step.

    Raises:
        UserError: the run has none.
    """
    source = root.sub(origin.run)
    for attempt in range(CLONES):
        kept = _checkpoints(source)
        if not kept:
            raise UserError(f"{source.uri} has no checkpoint to clone")
        step, folder = next((each for each in kept if each[0] >= origin.step), kept[-1])
        try:
            marker = source.get(f"{folder}/{MARKER}")
            for name in json.loads(marker)["files"]:
                _copy(source, f"{folder}/{name}", into)
            into.put(ORIGIN, json.dumps({"run": origin.run, "step": step}).encode())
            into.put(f"{folder}/{MARKER}", marker)
            return step
        except NotFound:  # the run has gone on, and removed it
            if attempt == CLONES - 1:
                raise
            for name in into.list("checkpoints"):
                into.delete(name)
    raise AssertionError


def _checkpoints(run: Store) -> list[tuple[int, str]]:
    """Steps and folders of a run's committed checkpoints, the oldest first."""
    folders = (name.removesuffix(f"/{MARKER}") for name in run.list("checkpoints") if name.endswith(f"/{MARKER}"))
    return sorted((int(folder.split("/")[-1].split("-")[1]), folder) for folder in folders)


def _copy(source: Store, name: str, into: Store) -> None:
    with tempfile.TemporaryDirectory(prefix="tessera-clone-") as folder:
        local = Path(folder) / "file"
        with open(local, "wb") as file:
            file.writelines(source.stream(name))
        into.put(name, local)


def _end_with_parent() -> None:
    """Let the run hear SIGTERM when this actor is killed (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return next(
        (line for line in reversed(lines) if line.startswith(("error:", "failed:", "stopped:"))), "".join(lines[-1:])
    )
