"""One run of a small recipe on the cluster, disturbed at a step drawn from a seed, and held to the undisturbed run.

The recipe has no batch statistics and computes in float64 with one thread, so that a run on as many workers gives the
same bits and one on another number of workers the same losses to 1e-9.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from jobs import package, recipes
from service.data.store import Store
from service.engine.checkpoint import committed
from tests.distributed.chaos.hosts import ROOT, Cluster

STEPS, EARLIEST, LATEST = 190, 25, 90  # of a run, and between which a fault comes: 100 steps and more follow it
SECONDS = 400.0  # within which a disturbed run ends
RELATIVE = 1e-9  # of losses in another world
PROMISED = "finished, equal"
SETTINGS = [
    "data.batch_size=32",
    "data.partitions=8",
    "family.encoder={kind: resnet, depth: 10, width: 4, norm: group}",
    "family.projector={layers: 2, hidden: 32, output: 32, norm: layer}",
    "schedule={steps: 190, warmup_epochs: 1, start_lr: 0}",
    "optim.lr=3e-5",
    "compute={precision: fp64, threads: 1, deterministic: true, device: cpu}",
    "parallel.workers=2",
    "parallel.cpus_per_worker=2",
    "checkpoint.every=20 steps",
    "tracking={log_every: 1 steps, model: chaos}",
    "eval.labels_per_class=[]",
]


@dataclass(frozen=True)
class Line:
    """A step that a rank took: when it ended (seconds since 1970), its number from 1, the world, the samples' ids."""

    time: float
    step: int
    world: int
    ids: list[int]


@dataclass(frozen=True)
class Life:
    """What one process of a rank took."""

    rank: int
    pid: int
    lines: list[Line]


def lives(folder: Path) -> list[Life]:
    """Processes that noted a step in a witness's folder, in order of their first."""
    found = []
    for path in folder.glob("*-*.jsonl"):
        rank, pid = map(int, path.stem.split("-"))
        whole = path.read_text().rpartition("\n")[0]
        lines = [Line(**json.loads(line)) for line in whole.splitlines()]
        found += [Life(rank, pid, lines)] if lines else []
    return sorted(found, key=lambda life: life.lines[0].time)


@dataclass
class Scene:
    """A run on a cluster, and what a fault needs to get at it."""

    cluster: Cluster
    settings: list[str]
    repeat: int
    storage: str
    driver: subprocess.Popen = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.cluster.folder / f"driver-{self.repeat}.log"
        shutil.rmtree(self.witness, ignore_errors=True)

    @property
    def witness(self) -> Path:
        """Where the run's ranks note their steps."""
        return self.cluster.witness / str(self.repeat)

    def start(self, *changes: str) -> None:
        """Give the command; given again, it resumes the run."""
        host = self.cluster.hosts[0]
        settings = [*self.settings, *changes, f"repeat={self.repeat}"]
        env = self.cluster.env | {
            "RAY_ADDRESS": self.cluster.gcs,
            "TESSERA_STORAGE": self.storage,
            "TESSERA_CACHE": str(self.cluster.folder / f"cache-{host.name}"),
        }
        command = host.command(sys.executable, "-u", "-m", "jobs.train", "demo", *settings)
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)

    def step(self) -> int:
        """Last step that all ranks have taken."""
        newest = {life.rank: life.lines[-1] for life in lives(self.witness)}
        whole = newest and len(newest) >= max(line.world for line in newest.values())
        return min(line.step for line in newest.values()) if whole else 0

    def wait_for(self, step: int, seconds: float = 180) -> None:
        """Return once the run has come so far."""
        end = time.monotonic() + seconds
        while self.step() < step:
            if self.driver.poll() is not None or time.monotonic() > end:
                raise TimeoutError(f"the run came to step {self.step()}, not {step}:\n{self.output()[-2000:]}")
            time.sleep(0.05)

    def worker(self, rank: int) -> int:
        """Process id of a rank."""
        return [life.pid for life in lives(self.witness) if life.rank == rank][-1]

    def output(self) -> str:
        """What the drivers and workers of the run printed."""
        return self.log.read_text(errors="replace")

    def run(self) -> Store:
        """The run's storage."""
        name = re.search(r"^run (\S+)$", self.output(), re.MULTILINE)
        assert name is not None, self.output()
        return Store(self.storage).sub(name[1])

    def committed(self) -> list[str]:
        """Folders of the committed checkpoints, the newest last."""
        return committed(self.run().sub("checkpoints"))

    def end(self) -> None:
        """End the driver if it still runs."""
        if self.driver.poll() is None:
            self.driver.send_signal(signal.SIGKILL)
        self.driver.wait()


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Args:
        inject: does it, and returns when it is over.
        again: the driver ends by it, and the command is given again, with these changes.
        first: changes of the first command.
        settings: of both commands, and of the undisturbed run.
        earliest: step before which it does not come.
        falls_back: committed checkpoints that may be lost.
        spares: the run goes on as if a step had not been, so that losses differ from it on.
        says: pattern of what the run must tell about it.
        storage: where the run's results go, if not to S3.
    """

    inject: Callable[[Scene, random.Random], object]
    again: tuple[str, ...] | None = None
    first: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    earliest: int = EARLIEST
    falls_back: int = 0
    spares: bool = False
    says: str | None = None
    storage: Callable[[Cluster], Any] | None = None


@dataclass(frozen=True)
class Reference:
    """Undisturbed run: loss of each step, ids of its samples, final scores."""

    losses: dict[int, float]
    ids: dict[int, list[int]]
    scores: dict[str, Any]


def code() -> str:
    """Hash of the product's code and of this suite's."""
    own = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return hashlib.sha256(package.code_hash().encode() + own).hexdigest()[:12]


def undisturbed(data: str, folder: Path, *changes: str) -> Reference:
    """Run the recipe on two plain processes, without Ray, MLflow or S3."""
    from tests.ranks import on_ranks

    with environment({"TESSERA_WITNESS": str(folder / "witness")}):
        rows, result = on_ranks(2, _train, [*SETTINGS, f"data.uri={data}", *changes], str(folder / "run"))[0]
    return Reference(rows, ids_of(lives(folder / "witness" / "0"))[0], result["scores"])


def _train(settings: list[str], folder: str) -> tuple[dict[int, float], dict[str, Any]]:
    from service.engine.loop import Run, train
    from service.engine.trainer import Trainer
    from tests.distributed.chaos.witness.sitecustomize import watch

    rows: dict[int, float] = {}

    def take(step: int, row: dict[str, float]) -> None:
        if "loss" in row:
            rows[step] = row["loss"]

    unwatched = Trainer.step, Trainer._batch
    watch(Trainer)
    try:
        return rows, train(recipes.load("demo", settings), Run(Store(folder)), rows=take) or {}
    finally:
        Trainer.step, Trainer._batch = unwatched


def ids_of(found: list[Life]) -> list[dict[int, list[int]]]:
    """Sorted ids of each step's samples, by attempt: a rank's n-th process belongs to the n-th attempt."""
    attempts: list[dict[int, list[int]]] = []
    counts: dict[int, int] = {}
    for life in found:
        number = counts[life.rank] = counts.get(life.rank, -1) + 1
        attempts += [{}] if number == len(attempts) else []
        for line in life.lines:
            attempts[number].setdefault(line.step, []).extend(line.ids)
    return [{step: sorted(ids) for step, ids in attempt.items()} for attempt in attempts]


def disturb(cluster: Cluster, name: str, fault: Fault, seed: int, data: str, expected: Reference) -> dict[str, Any]:
    """Run once with the fault at a step drawn from the seed, and return what came of it."""
    rng = random.Random(f"{name} {seed}")
    at = rng.randrange(fault.earliest, LATEST)
    repeat = 1 + seed + 1000 * (1 + int(hashlib.sha256(name.encode()).hexdigest()[:4], 16))
    with environment(cluster.s3.env()), (fault.storage or _on_s3)(cluster) as storage:
        scene = Scene(cluster, [*SETTINGS, f"data.uri={data}", *fault.settings], repeat, storage)
        scene.start(*fault.first)
        try:
            scene.wait_for(at)
            before, began = scene.committed(), time.time()
            fault.inject(scene, rng)
            if fault.again is not None:
                scene.driver.wait(SECONDS)
                scene.start(*fault.again)
            code = scene.driver.wait(SECONDS)
            return {"fault": name, "seed": seed, "at": at} | judge(scene, fault, at, before, began, code, expected)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            return {"fault": name, "seed": seed, "at": at, "outcome": f"hangs: {str(error).splitlines()[0]}"}
        finally:
            scene.end()


@contextmanager
def _on_s3(cluster: Cluster) -> Iterator[str]:
    yield cluster.env["TESSERA_STORAGE"]


def judge(
    scene: Scene, fault: Fault, at: int, before: list[str], began: float, code: int, expected: Reference
) -> dict[str, Any]:
    """Compare a run that was disturbed at `began` with the undisturbed one.

    Returns:
        Outcome, steps that were taken twice, seconds without a new step, and every promise that was broken.
    """
    found = lives(scene.witness)
    losses = losses_of(scene.run())
    ranks = [life for life in found if life.rank == 0]
    lost = sum(max(0, first.lines[-1].step - then.lines[0].step + 1) for first, then in pairwise(ranks))
    resumed = min((life.lines[0].step - 1 for life in ranks[1:]), default=None)
    kept = [int(folder.split("-")[1]) for folder in before[: len(before) - fault.falls_back]]
    broken = []
    if code:
        broken.append(f"the command ended with {code}")
    if resumed is not None and kept and resumed < kept[-1]:
        broken.append(f"resumed at {resumed}, and step {kept[-1]} was committed")
    broken += differing(losses, expected.losses, exact=not _other_world(found), until=at if fault.spares else STEPS)
    broken += [
        f"step {step} took other samples"
        for attempt in ids_of(found)
        for step, ids in attempt.items()
        if len(ids) == len(expected.ids[step]) and ids != expected.ids[step]
    ][:1]
    if fault.says is not None and not re.search(fault.says, scene.output()):
        broken.append(f"the run does not say {fault.says!r}")
    return {
        "outcome": "; ".join(broken) or PROMISED,
        "restarts": len(ranks) - 1,
        "lost_steps": lost,
        "seconds": pause(ranks, began),
        "worlds": sorted({line.world for life in found for line in life.lines}),
    }


def losses_of(run: Store) -> dict[int, set[float]]:
    """Losses of each step, of all its attempts."""
    found: dict[int, set[float]] = {}
    for name in run.list("metrics"):
        for line in run.get(name).splitlines():
            row = json.loads(line)
            if "loss" in row["metrics"]:
                found.setdefault(row["step"], set()).add(row["metrics"]["loss"])
    return found


def differing(losses: dict[int, set[float]], expected: dict[int, float], exact: bool, until: int) -> list[str]:
    """Say which steps' losses are missing, or differ from the undisturbed run's, in bits or by 1e-9 relative."""
    tolerance = 0.0 if exact else RELATIVE

    def close(step: int, loss: float) -> bool:
        return abs(loss - expected[step]) <= tolerance * abs(expected[step])  # which no NaN is

    wrong = [s for s in sorted(losses) if s <= until and not all(close(s, loss) for loss in losses[s])]
    missing = sorted(set(expected) - set(losses))
    told = [f"{len(wrong)} losses differ, first of step {wrong[0]}"] if wrong else []
    return told + ([f"{len(missing)} rows are missing, first of step {missing[0]}"] if missing else [])


def pause(ranks: list[Life], began: float) -> float:
    """Longest time without a new step that ended after a fault, in seconds; a step's own time is part of it."""
    newest, times = 0, []
    for line in sorted((line for life in ranks for line in life.lines), key=lambda line: line.time):
        if line.step > newest:
            newest = line.step
            times.append(line.time)
    return round(max((later - earlier for earlier, later in pairwise(times) if later > began), default=0.0), 2)


def _other_world(found: list[Life]) -> bool:
    return {line.world for life in found for line in life.lines} != {2}


def summary(results: list[dict[str, Any]]) -> str:
    """Markdown table: a row a fault, medians and largest values over its seeds."""
    rows = ["| fault | tried | as promised | steps lost | s to the next new step |", "| --- | --: | --: | --: | --: |"]
    for name in dict.fromkeys(each["fault"] for each in results):
        mine = [each for each in results if each["fault"] == name]
        good = [each for each in mine if each["outcome"] == PROMISED]
        ends = [each for each in mine if "seconds" in each]
        lost, seconds = ([each[key] for each in ends] or [float("nan")] for key in ("lost_steps", "seconds"))
        rows.append(
            f"| {name} | {len(mine)} | {len(good)} | {median(lost):g} (≤ {max(lost):g}) | "
            f"{median(seconds):.1f} (≤ {max(seconds):.1f}) |"
        )
    return "\n".join(rows)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables of this process for a block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
