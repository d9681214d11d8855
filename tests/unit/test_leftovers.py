"""What `tessera gc` takes for left behind, and what it leaves alone."""

import json
import os
import subprocess
import sys
import tempfile
import time

import pytest
from click.testing import CliRunner

from jobs import cli_doctor, leftovers
from jobs.probe import PLACE
from service.data.cache import beyond_budget, cache_root
from service.data.store import Store
from service.engine import MARKER
from service.engine.lease import Holder, Lease

DAY = 86400.0
LONG_AGO = time.time() - 3 * DAY


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary folder of the test's own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return folder


def aged(path, at=LONG_AGO, content=b"x" * 100):
    """Make a file whose folders, up to the first that was there, were last written then."""
    new = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    for each in (path, *new):
        os.utime(each, (at, at))
    return path


def found(older_than=DAY, cache_bytes=1e9):
    return {(each.kind, each.where.rsplit("/", 1)[-1]) for each in leftovers.of_host(older_than, cache_bytes)}


def test_folders_of_ended_processes_are_found_and_others_left(temporary):
    aged(temporary / "tessera-old" / "code" / "x.py")
    aged(temporary / "tessera-young" / "x", at=time.time())
    aged(temporary / "tessera-grown" / "x")
    aged(temporary / "tessera-grown" / "deep" / "y", at=time.time())
    aged(temporary / "somebody" / "x")
    aged(temporary / "ray" / "session_2026-01-01_00-00-00_000000_1" / "logs" / "x")
    (temporary / "tessera-link").symlink_to(temporary / "somebody")
    assert found() == {("temporary folder", "tessera-old"), ("Ray session", "session_2026-01-01_00-00-00_000000_1")}
    assert {name for _, name in found(older_than=7 * DAY)} == set()


def test_a_folder_that_a_process_names_stays(temporary):
    folder = aged(temporary / "tessera-held" / "x").parent
    assert found() == {("temporary folder", "tessera-held")}
    for command, cwd in (["sleep", "60"], folder), ([sys.executable, "-c", "input()", str(folder)], "/"):
        with subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE) as process:
            assert found() == set()
            process.kill()
    assert found() == {("temporary folder", "tessera-held")}


def test_a_folder_younger_than_a_living_driver_stays(temporary):
    """A driver holds some without naming them."""
    folder = temporary / "tessera-ray-x"
    folder.mkdir()
    judge = [folder, 100.0, "", 200.0, 150.0]
    assert leftovers.is_abandoned(*judge)
    judge[3] = 90.0
    assert not leftovers.is_abandoned(*judge)


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        ("python -m jobs.train run.json", True),
        ("/opt/v/bin/python /opt/v/bin/tessera tune x", True),
        ("tessera submit demo", True),
        ("python -m pytest", False),
        ("vim jobs.train", False),
        ("-m", False),
        ("", False),
    ],
)
def test_our_processes_are_told_by_their_command(command, ours):
    assert leftovers.is_ours(command.split()) == ours


def test_caches_shrink_to_their_budget_oldest_first(temporary):
    now = time.time()
    for age, name in enumerate(("shards/a", "resident/b.npy", "shards/c", "shards/aa.lock", "resident/b.bad.npy")):
        aged(cache_root() / name, at=now - 1000 * age)
    assert [path.name for path, _, _ in beyond_budget(300)] == []
    assert [path.name for path, _, _ in beyond_budget(299)] == ["c"]
    assert [path.name for path, _, _ in beyond_budget(100)] == ["c", "b.npy"]
    rows = list(leftovers.carry_out(leftovers.of_host(DAY, 100), dry_run=True))
    assert {row.state for row in rows} == {"found"} and (cache_root() / "shards" / "c").exists()
    rows = list(leftovers.carry_out(leftovers.of_host(DAY, 100), dry_run=False))
    assert [(row.kind, row.size, row.state) for row in rows] == [("cached data", 100, "removed")] * 2
    assert beyond_budget(100) == []


def abandon(run, beat):
    """A lease of a driver on another host, last heard of then."""
    run.put("lease/000001.json", json.dumps(vars(Holder("elsewhere", 1, 0.0, None))).encode())
    run.put("lease/000001.beat", str(beat).encode())


@pytest.fixture
def storage(tmp_path):
    """Runs of a dead driver, of a living one, of one that has ended well, and trials of a sweep that goes on."""
    root, now = Store(tmp_path / "runs"), time.time()
    abandon(root.sub("sweep"), now)
    aged(tmp_path / "runs" / "sweep" / "ledger.json#123")
    aged(tmp_path / "runs" / "sweep" / "clone" / "checkpoints" / "step-00000010-lease-000001" / "data")  # not begun yet
    beats = {"dead": LONG_AGO, "alive": now, "done": 0.0, "sweep/dead": LONG_AGO, "sweep/alive": now}
    for name, beat in beats.items():
        run = root.sub(name)
        abandon(run, beat)
        for step, files in ((10, ("data", MARKER)), (20, ("data", "metadata"))):
            for file in files:
                aged(tmp_path / "runs" / name / "checkpoints" / f"step-{step:08d}-lease-000001" / file)
        aged(tmp_path / "runs" / name / "checkpoints" / "x#123")
    aged(tmp_path / "runs" / PLACE / "left")
    return root


def test_torn_checkpoints_and_half_written_objects_of_dead_runs_only(storage):
    before, dead = set(storage.list()), ("dead", "done", "sweep/dead")
    there = leftovers.of_storage(storage.uri, DAY)
    torn = "checkpoints/step-00000020-lease-000001"
    assert {(each.kind, each.where.removeprefix(f"{storage.uri}/"), each.size) for each in there} == {
        *((("torn checkpoint"), f"{run}/{torn}", 200) for run in dead),
        *((("unfinished object"), f"{run}/checkpoints/x#123", 100) for run in dead),
        ("trial object", f"{PLACE}/left", 100),
    }
    assert leftovers.of_storage(storage.uri, 5 * DAY) == []
    rows = list(leftovers.carry_out(there, dry_run=False))
    assert {row.state for row in rows} == {"removed"}
    gone = {f"{run}/{torn}/{file}" for run in dead for file in ("data", "metadata")}
    assert set(storage.list()) == before - gone - {f"{PLACE}/left"}
    held = {"alive/checkpoints/x#123", "sweep/alive/checkpoints/x#123", "sweep/ledger.json#123"}
    assert {each.name for each in storage.unfinished()} == held
    assert leftovers.of_storage(storage.uri, 0.0) == []


def test_packages_that_no_run_and_no_job_names_go(storage):
    folder = storage.local_path
    for name in ("begun", "submitted", "forgotten"):
        aged(folder / "packages" / f"{name}.zip")
    aged(folder / "packages" / "young.zip", at=time.time())
    storage.put("dead/state.json", json.dumps({"archive": "begun"}).encode())
    rows = list(leftovers.carry_out(leftovers.of_packages(storage.uri, DAY, {"submitted"}), dry_run=False))
    assert [(row.where, row.state) for row in rows] == [(f"{storage.uri}/packages/forgotten.zip", "removed")]
    assert storage.list("packages") == [f"packages/{name}.zip" for name in ("begun", "submitted", "young")]


def test_a_run_that_comes_to_life_is_left_alone(storage):
    there = [each for each in leftovers.of_storage(storage.uri, DAY) if "/done/" in each.where]
    assert len(there) == 2
    with Lease(storage.sub("done")):
        rows = list(leftovers.carry_out(there, dry_run=False))
    assert [row.state for row in rows] == ["kept"] * 2 and all("alive again" in row.reason for row in rows)
    assert leftovers.torn_checkpoints(storage.list()).keys() >= {"done/checkpoints/step-00000020-lease-000001"}


def test_what_cannot_be_removed_is_kept_with_the_reason(tmp_path):
    (row,) = leftovers.carry_out(
        [leftovers.Leftover("temporary folder", "x", 1, 1.0, leftovers._remover(tmp_path / "gone"))], dry_run=False
    )
    assert row.state == "kept" and "gone" in row.reason


def test_the_command_collects_on_a_host_without_a_cluster(temporary, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = aged(temporary / "tessera-old" / "x").parent

    def call(*arguments, code=0):
        done = CliRunner().invoke(cli_doctor.gc, arguments, standalone_mode=False)
        assert isinstance(done.exception, SystemExit | None) and done.exit_code == code, done.output
        return done.stdout

    shown = json.loads(call("--dry-run", "--json"))
    assert [row["where"] for row in shown["leftovers"]] == [str(folder)] and shown["bytes"] == 100
    assert shown["dry_run"] and folder.exists() and "no stack runs" in shown["unreached"][0]
    assert "0 leftovers" in call("--older-than", "4d")
    assert "1 leftovers" in call() and not folder.exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800.0), ("12h", 43200.0), ("1.5d", 129600.0), ("0s", 0.0), ("10", None), ("d", None)]
)
def test_durations(text, seconds):
    if seconds is None:
        with pytest.raises(Exception, match="is no duration: write a number and s, m, h or d"):
            cli_doctor.Duration().convert(text, None, None)
    else:
        assert cli_doctor.Duration().convert(text, None, None) == seconds
