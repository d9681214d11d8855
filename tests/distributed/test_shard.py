"""`tessera shard` in several processes: killed, interrupted, out of room, to a folder and to S3."""

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from datasets_prep.index import INDEX_NAME
from jobs.shard import shard
from service.data.store import Store

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
RECORD = re.compile(r"incomplete/\w+/\w+/shard-\d+\.json")
SCALED = ("--short-side", "80", "--shard-mb", "1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """600 noise images, 12 MB when they are scaled to 80 pixels."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(600):
        path = root / "train" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (100, 100, 3), np.uint8)).save(path, compress_level=0)
    return root


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    """The bytes that one run with one process writes."""
    from datasets_prep.images import ImagePolicy

    out = tmp_path_factory.mktemp("undisturbed")
    shard("imagefolder", str(out), photos, shard_mb=1, images=ImagePolicy(short_side=80))
    assert len(files(out)) == 2 + 2 * 13
    return files(out)


def files(folder):
    """Everything in a folder, also what a store does not list."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(photos, out, *options):
    return [
        sys.executable,
        "-m",
        "jobs.cli",
        "shard",
        "imagefolder",
        *map(str, ("--source", photos, "--out", out, *options)),
    ]


def run(photos, out, *options, code=0, **arguments):
    done = subprocess.run(
        command(photos, out, *options), capture_output=True, text=True, cwd=ROOT, check=False, **arguments
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def start_and_signal(photos, out, store, number, records, *options):
    """Send a signal when so many shards are finished; return stderr once no process of the command is left."""
    process = subprocess.Popen(command(photos, out, *options), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while sum(map(bool, map(RECORD.fullmatch, store.list()))) < records:
        assert process.poll() is None, "finished before the signal"
        time.sleep(0.005)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) >= 4, "three workers"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert not store.exists(INDEX_NAME)
    return process.returncode, error


def stamps(out, store):
    """What identifies the finished shards' files."""
    finished = ["/".join(name.split("/")[2:]).removesuffix(".json") for name in store.list() if RECORD.fullmatch(name)]
    rows = [out / f"{name}.{kind}" for name in finished for kind in ("tar", "npy")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in rows}


def test_a_killed_command_goes_on_and_writes_the_same_bytes(photos, undisturbed, tmp_path):
    out, store = tmp_path / "out", Store(tmp_path / "out")
    finished = {}
    for records in (random.randint(1, 4), random.randint(6, 9)):
        start_and_signal(photos, out, store, signal.SIGKILL, records, "--workers", 3, *SCALED)
        assert finished.items() <= stamps(out, store).items()
        finished = stamps(out, store)
    done = run(photos, out, "--workers", 2, "--json", *SCALED)
    assert f"{len(finished) // 2} of 13 shards are kept" in done.stderr
    assert json.loads(done.stdout)["samples"] == {"train": 540, "val": 60}
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished} == finished
    assert files(out) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_how_to_go_on(photos, tmp_path, number):
    out, store = tmp_path / "out", Store(tmp_path / "out")
    code, error = start_and_signal(photos, out, store, number, 2, "--workers", 3, *SCALED)
    assert code == 130 and "Traceback" not in error
    assert [line for line in error.splitlines() if line] == [
        f"{out} is not finished: the same command goes on",
        "interrupted",
    ]
    assert not [name for name in files(out) if "#" in name]


def test_a_killed_worker_ends_the_command_with_an_error(photos, tmp_path):
    out, store = tmp_path / "out", Store(tmp_path / "out")
    process = subprocess.Popen(
        command(photos, out, "--workers", 2, *SCALED), stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while not any(map(RECORD.fullmatch, store.list())):
        time.sleep(0.005)
    workers = [each for each in psutil.Process(process.pid).children() if "spawn_main" in " ".join(each.cmdline())]
    workers[-1].kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "fewer --workers" in error and "Traceback" not in error
    assert not store.exists(INDEX_NAME)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(photos, tmp_path):
    out = tmp_path / "out"
    limit = 700_000  # bytes of a file: no shard fits

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(photos, out, "--workers", 2, *SCALED, code=2, preexec_fn=little_room)
    assert re.search(rf"error: {out}/train/shard-\d+.tar: File too large: free space", done.stderr)
    assert not [name for name in files(out) if "#" in name or name.endswith(".tar")]


def test_s3_gets_the_same_bytes_after_a_kill(photos, undisturbed, s3_env):
    out = f"s3://{s3_env().bucket}/{uuid.uuid4().hex}"
    store = Store(out)
    start_and_signal(photos, out, store, signal.SIGKILL, 3, "--workers", 3, *SCALED)
    done = run(photos, out, "--workers", 2, *SCALED)
    assert "of 13 shards are kept" in done.stderr
    assert {name: store.get(name) for name in store.list()} == undisturbed
