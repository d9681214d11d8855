"""What goes wrong: a table from names to what does it. Each is given the running scene and a seeded generator."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from tests.distributed.chaos.harness import Fault, Scene
from tests.distributed.chaos.hosts import Cluster

OUTAGE = 20.0  # seconds
DISK = 24 << 20  # bytes of the small file system: checkpoints of the recipe fit many times


def kill_worker(scene: Scene, rng: Random) -> None:
    os.kill(scene.worker(rng.randrange(2)), signal.SIGKILL)


def kill_raylet(scene: Scene, rng: Random) -> None:
    """Ray's part of the second host dies, its workers with it, and another joins."""
    host = scene.cluster.hosts[1]
    os.kill(host.raylet(), signal.SIGKILL)
    time.sleep(rng.uniform(1, 3))
    host.kill()
    scene.cluster.start(host)


def kill_node(scene: Scene, rng: Random) -> None:
    """The second host loses power, and a new one comes at its address."""
    host = scene.cluster.hosts[1]
    host.kill()
    time.sleep(rng.uniform(1, 3))
    scene.cluster.start(host)


def kill_driver(scene: Scene, rng: Random) -> None:
    scene.driver.send_signal(signal.SIGKILL)


def terminate_driver(scene: Scene, rng: Random) -> None:
    scene.driver.send_signal(signal.SIGTERM)


def stop_s3(scene: Scene, rng: Random) -> None:
    os.kill(scene.cluster.s3.pid, signal.SIGSTOP)
    time.sleep(OUTAGE)
    os.kill(scene.cluster.s3.pid, signal.SIGCONT)


def refuse_s3(scene: Scene, rng: Random) -> None:
    _with_s3(scene, lambda method, path: 503, OUTAGE)


def spoil_s3(scene: Scene, rng: Random) -> None:
    """One S3 request in twenty fails: an error, or half a body; a worker dies meanwhile, so that all is read again."""
    draws = Random(rng.random())

    def fault(method: str, path: str) -> int | None:
        spoilt = draws.random() < 0.05
        return draws.choice([500, 503, 200] if method == "GET" else [500, 503]) if spoilt else None

    scene.cluster.s3_fault = fault
    try:
        kill_worker(scene, rng)
        scene.driver.wait(240)
    finally:
        scene.cluster.s3_fault = _passes


def _with_s3(scene: Scene, fault, seconds: float) -> None:
    scene.cluster.s3_fault = fault
    try:
        time.sleep(seconds)
    finally:
        scene.cluster.s3_fault = _passes


def _passes(method: str, path: str) -> None:
    return None


def corrupt_newest(scene: Scene, rng: Random) -> None:
    """Both workers die, and the newest checkpoint has one byte more than was written, or another."""
    for rank in (0, 1):
        os.kill(scene.worker(rank), signal.SIGKILL)
    store, folder = scene.run().sub("checkpoints"), scene.committed()[-1]
    name = rng.choice([name for name in store.list(folder) if not name.endswith(".json")])
    body = bytearray(store.get(name))
    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    store.put(name, bytes(body))


def stop_mlflow(scene: Scene, rng: Random) -> None:
    scene.cluster.mlflow.kill()
    time.sleep(OUTAGE)
    scene.cluster.mlflow.start()


def fill_disk(scene: Scene, rng: Random) -> None:
    """Another program fills the disk that the run's storage is on, and gives it back after a while."""
    filler = Path(scene.storage).parent / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(64 << 10))
    time.sleep(OUTAGE / 2)
    filler.unlink()


@contextmanager
def small_disk(cluster: Cluster) -> Iterator[str]:
    """A folder on a small file system."""
    folder = Path(tempfile.mkdtemp(prefix="tessera-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield str(folder / "runs")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def poison(scene: Scene, rng: Random) -> None:
    """The images of one rank are NaN in one of the next steps."""
    (scene.witness / "nan.json").write_text(json.dumps([rng.randrange(2), scene.step() + rng.randrange(5, 10)]))


def freeze_worker(scene: Scene, rng: Random) -> None:
    os.kill(scene.worker(rng.randrange(2)), signal.SIGSTOP)


FAULTS: dict[str, Fault] = {
    "worker killed": Fault(kill_worker),
    "worker killed, FSDP": Fault(kill_worker, settings=("parallel.kind=fsdp",)),
    "raylet killed": Fault(kill_raylet),
    "node killed": Fault(kill_node),
    "driver killed": Fault(kill_driver, again=()),
    "driver terminated": Fault(terminate_driver, again=()),
    "S3 silent 20 s": Fault(stop_s3),
    "S3 refuses 20 s": Fault(refuse_s3),
    "S3 5 % errors": Fault(spoil_s3),
    "newest checkpoint corrupted": Fault(corrupt_newest, earliest=65, falls_back=1, says="unusable"),
    "MLflow away 20 s": Fault(stop_mlflow),
    "disk full": Fault(fill_disk, storage=small_disk),
    "NaN in one rank": Fault(poison, spares=True, says=r"step \d+ is not taken"),
    "worker frozen": Fault(freeze_worker, first=("parallel.hang_minutes=0.5", "data.deadline_minutes=0.4")),
    "2 → 1 workers": Fault(kill_driver, again=("parallel.workers=1",)),
    "1 → 2 workers": Fault(kill_driver, first=("parallel.workers=1",), again=()),
    "4 → 2 workers": Fault(kill_driver, first=("parallel.workers=4", "parallel.cpus_per_worker=1"), again=()),
}
