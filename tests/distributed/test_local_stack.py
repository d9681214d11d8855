"""The stack of one machine, from `up` to `down`, with the job API used as any client uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import local, profiles
from datasets_prep.errors import UserError

pytestmark = pytest.mark.distributed

CALL_UP = "import sys; from pathlib import Path; from cluster import local; local.up(Path(sys.argv[1]), s3=True)"
SUBMIT = """
import json, sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient()
job = client.submit_job(entrypoint=sys.argv[1])
while not client.get_job_status(job).is_terminal():
    time.sleep(0.1)
print(json.dumps([client.get_job_info(job).driver_exit_code, client.get_job_logs(job)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Data folder of this module's stack; the user's own state stays untouched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield tmp_path_factory.mktemp("stack")
        local.down()


@pytest.fixture(scope="module")
def stack(folder) -> local.Stack:
    """A stack whose starter has ended."""
    subprocess.run([sys.executable, "-c", CALL_UP, str(folder)], check=True, timeout=200)
    running = local.current()
    assert running is not None
    return running


def submit(stack: local.Stack, entrypoint: str) -> tuple[int, str]:
    """Run a job from a fresh process with the client's environment and nothing else."""
    env = {"PATH": os.defpath, "HOME": os.environ["HOME"], **local.client_environment(stack)}
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, entrypoint], env=env, check=True, timeout=120, capture_output=True, text=True
    )
    code, logs = json.loads(done.stdout.splitlines()[-1])
    return code, logs


def marked(stack: local.Stack) -> list[int]:
    """Living processes that carry the stack's mark or have one of its files open in their command line."""
    found = []
    for process in psutil.process_iter(["environ", "cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        ours = (process.info["environ"] or {}).get("TESSERA_STACK") == stack.id
        if ours or any(str(stack.scratch) in word for word in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def test_every_server_runs_and_secrets_are_private(stack):
    health = {server.name: server for server in local.status()}
    assert sorted(health) == ["mlflow", "ray", "s3"]
    assert all(server.alive and server.memory > 50e6 for server in health.values())
    for secret in ("stack.json", "ray_token", "s3/iam.json"):
        assert (stack.data / secret).stat().st_mode & 0o077 == 0, secret


def test_a_second_up_finds_the_first(stack):
    begin = time.monotonic()
    assert local.up(stack.data) == stack
    assert time.monotonic() - begin < 2


def test_another_folder_or_another_ray_is_refused(stack, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"a stack with data={stack.data} is running.*tessera down"):
        local.up(tmp_path / "other")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # as another user would see it
    assert local.current() is None
    with pytest.raises(UserError, match=f"another Ray runs on this machine .*{stack.ray_address}.*ray stop"):
        local.up(tmp_path / "other")
    assert local.down() is None


def test_the_job_api_asks_for_the_token(stack):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{stack.ray_address}/api/jobs/", timeout=10)


def test_a_job_gets_our_python_and_the_stack_s_addresses(stack):
    names = "MLFLOW_TRACKING_URI TESSERA_STORAGE AWS_ENDPOINT_URL"
    program = f'import os, sys; print(sys.executable, *map(os.environ.get, "{names}".split())); sys.exit(3)'
    code, logs = submit(stack, f"python -c '{program}'")
    assert code == 3
    said = logs.splitlines()[-1].split()
    assert Path(said[0]).parent == Path(sys.executable).parent
    assert said[1:] == [stack.mlflow_uri, "s3://runs", stack.s3_endpoint]


def test_the_local_profile_is_the_stack(stack):
    profile = profiles.resolve("local")
    assert (profile.jobs_address, profile.tracking_uri) == (stack.ray_address, stack.mlflow_uri)
    assert profile.storage_uri == "s3://runs"
    assert profile.cpus == psutil.cpu_count()
    assert profiles.resolve(stack.ray_address).env == profile.env


def test_s3_keeps_what_is_written_and_refuses_strangers(stack, monkeypatch):
    from service.data.store import AccessDenied, Store

    for name, value in stack.env.items():
        monkeypatch.setenv(name, value)
    Store("s3://data/greeting").put("hello", b"world")
    assert Store(f"{stack.storage_uri}/run").list() == []
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied):
        Store("s3://data/greeting").get("hello")


def test_up_revives_a_server_that_died_and_leaves_the_others_alone(stack):
    mlflow = psutil.Process(stack.pids["mlflow"])
    for process in [mlflow, *mlflow.children(recursive=True)]:
        process.kill()
    while mlflow.is_running() and mlflow.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert local.current() is None
    assert {server.name: server.alive for server in local.status()} == {"ray": True, "mlflow": False, "s3": True}
    revived = local.up(stack.data)
    assert revived.pids["ray"] == stack.pids["ray"] and revived.pids["mlflow"] != stack.pids["mlflow"]
    assert revived.mlflow_uri == stack.mlflow_uri


def test_down_ends_every_process_and_up_reopens_the_data(stack, monkeypatch):
    from service.data.store import Store

    env = {**os.environ, **local.client_environment(stack)}
    start = "from ray.job_submission import JobSubmissionClient as C; C().submit_job(entrypoint='sleep 987')"
    subprocess.run([sys.executable, "-c", start], env=env, check=True, timeout=60)
    end = time.monotonic() + 60
    while ["sleep", "987"] not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]:
        assert time.monotonic() < end, "the job did not start"
        time.sleep(0.1)
    bystander = subprocess.Popen(["sleep", "60"])
    begin = time.monotonic()
    assert local.down() is not None
    assert time.monotonic() - begin < 15
    assert marked(stack) == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert not stack.scratch.exists() and not (stack.data / "stack.json").exists()
    assert list((stack.data / "logs" / "ray").glob("job-driver-*.log"))
    assert local.down() is None

    reopened = local.up(stack.data)
    assert reopened.id != stack.id
    for name, value in reopened.env.items():
        monkeypatch.setenv(name, value)
    assert Store("s3://data/greeting").get("hello") == b"world"
    psutil.Process(reopened.pids["ray"]).kill()  # a head that is gone takes nothing with it that `down` would miss
    local.down()
    assert marked(reopened) == []


def test_a_server_that_fails_stops_the_others_and_shows_its_log(folder, tmp_path, monkeypatch):
    local.down()
    monkeypatch.setattr(local, "_mlflow_command", lambda stack: [sys.executable, "-c", "raise SystemExit('no disk')"])
    with pytest.raises(UserError, match="(?s)mlflow ended with code 1 at its start:.*no disk.*mlflow.log"):
        local.up(tmp_path)
    assert local.current() is None
    rays = [process for process in psutil.process_iter(["name", "status"]) if process.info["name"] == "gcs_server"]
    assert [process for process in rays if process.info["status"] != psutil.STATUS_ZOMBIE] == []
