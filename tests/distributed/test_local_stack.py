"""The stack of one machine, from `up` to `down`, with the job API used as any client uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from cluster import local, profiles
from cluster.doctor import Finding
from datasets_prep.errors import UserError
from jobs import doctor as checks
from jobs import leftovers
from service.data.store import Store
from service.engine.lease import Holder
from tests.distributed.test_submit import ABANDON

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


@pytest.fixture
def client(stack, monkeypatch) -> Callable[..., checks.Subject]:
    """A doctor's subject: this stack as a client with its environment sees it, but for some changes."""

    def see(located: profiles.Located | None = None, data: str | None = None, **changes: str) -> checks.Subject:
        located = located or profiles.locate("local", stack)
        env = {**located.env, **changes}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return checks.Subject(located, env, data)

    return see


def host_findings(subject: checks.Subject) -> dict[str, Finding]:
    """Rows of the host and the servers, without those of the nodes."""
    found: dict[str, Finding] = {}
    for finding in checks.examine(subject):
        found[finding.name] = finding
        if finding.name == "Ray":
            break
    return found


def run(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments), "--json"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_doctor_finds_nothing_wrong_with_a_healthy_stack(stack, client, few_digits):
    client()
    upload(few_digits, "s3://data/few")
    found = run("doctor", "--recipe", "demo", "--data", "s3://data/few")
    states = {row["name"]: row["state"] for row in found["checks"]}
    assert [name for name, state in states.items() if state == "fail"] == []
    assert set(states) >= {name for name, _ in checks.NODES}
    working = ("packages", "one Ray", "local stack", "MLflow", "storage", "data", "partitions", "Ray", "room", "nodes")
    from_nodes = ("same versions", "clocks of nodes", "data from nodes", "MLflow from nodes")
    assert {states[name] for name in (*working, *from_nodes)} == {"ok"}
    reduced = next(row for row in found["checks"] if row["name"] == "all-reduce")
    assert reduced["state"] == "ok" and "2 ranks on 1 node by gloo" in reduced["found"]
    assert Store("s3://runs").list() == [], "what was written to try the store"
    assert [job for job in asked(stack, "/api/jobs/") if "jobs.nodes" in job["entrypoint"]] == []


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            Store(uri).put(path.relative_to(folder).as_posix(), path)


def asked(stack: local.Stack, page: str) -> Any:
    token = Path(stack.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{stack.ray_address}{page}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_the_doctor_names_wrong_keys_and_a_missing_index(client):
    found = host_findings(client(AWS_SECRET_ACCESS_KEY="wrong", data="s3://data/nothing"))
    assert {name for name, finding in found.items() if finding.state == "fail"} == {"storage", "data"}
    assert "access denied" in found["storage"].found and "credentials" in found["storage"].cure
    found = host_findings(client(data="s3://data/nothing"))
    assert found["storage"].state == "ok" and "holds no index.json" in found["data"].found
    assert "tessera shard" in found["data"].cure


def test_the_doctor_names_a_wrong_token(stack, client, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    for name in ("MLFLOW_TRACKING_URI", "TESSERA_STORAGE"):
        monkeypatch.setenv(name, stack.env[name])
    elsewhere = profiles.locate(f"http://localhost:{stack.ports['dashboard']}", None)
    found = {finding.name: finding for finding in checks.examine(client(elsewhere))}
    assert "refused the token" in found["Ray"].found and "RAY_AUTH_TOKEN" in found["Ray"].cure
    assert {found[name].state for name, _ in checks.NODES} == {"skipped"}


def test_the_doctor_names_a_full_disk(client, small_disk):
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    found = host_findings(client(TESSERA_STORAGE=str(small_disk / "runs")))
    assert {name for name, finding in found.items() if finding.state == "fail"} == {"disk", "storage"}
    assert str(small_disk) in found["disk"].found and "free space" in found["storage"].cure


def test_the_doctor_names_a_second_ray(client, tmp_path):
    import ray

    server = Path(ray.__file__).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"
    options = ["--gcs_server_port=0", "--session-name=other", "--node-ip-address=127.0.0.1", f"--log_dir={tmp_path}"]
    second = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = host_findings(client())["one Ray"]
    finally:
        second.kill()
        second.wait()
    assert found.state == "fail" and f"other (processes {second.pid})" in found.found
    assert host_findings(client())["one Ray"].state == "ok"


def test_gc_removes_what_dead_runs_left_and_nothing_else(stack, client):
    """Nothing on this machine is that old, so that a developer's own folders stay."""
    import mlflow

    client()
    root = Store(stack.storage_uri)
    for name, beat in (("dead", 1.0), ("alive", time.time() + 600)):
        root.put(f"{name}/lease/000001.json", json.dumps(vars(Holder("elsewhere", 1, 0.0, None))).encode())
        root.put(f"{name}/lease/000001.beat", str(beat).encode())
        root.put(f"{name}/checkpoints/step-00000010-lease-000001/data", b"torn")
        boto3.Session().client("s3").create_multipart_upload(Bucket="runs", Key=f"{name}/checkpoints/cut")
    api = mlflow.MlflowClient(stack.mlflow_uri, stack.mlflow_uri)
    dead = api.create_run("0", tags={"storage": root.sub("dead").uri, "run": "dead"}, run_name="dead")
    code, logs = submit(stack, f"python -c '{ABANDON}'")
    assert code == 0, logs
    group = logs.splitlines()[-1]
    of_ray = {("MLflow run, killed", "dead"), ("placement group", group)}
    of_storage = {
        ("torn checkpoint", "s3://runs/dead/checkpoints/step-00000010-lease-000001"),
        ("unfinished object", "s3://runs/dead/checkpoints/cut"),
    }
    for dry_run, state in (True, "found"), (False, "removed"):
        found = run("gc", "--older-than", "36500d", "--cache-gb", "1000", *(["--dry-run"] if dry_run else []))
        assert {(row["kind"], row["where"]): row["state"] for row in found["leftovers"]} == dict.fromkeys(of_ray, state)
        assert found["unreached"] == []
        rows = leftovers.carry_out(leftovers.of_storage(root.uri, 0.0), dry_run)
        assert {(row.kind, row.where): row.state for row in rows} == dict.fromkeys(of_storage, state)
    assert root.list() == [
        "alive/checkpoints/step-00000010-lease-000001/data",
        *(f"{name}/lease/000001.{kind}" for name in ("alive", "dead") for kind in ("beat", "json")),
    ]
    assert [each.name for each in root.unfinished()] == ["alive/checkpoints/cut"]
    assert api.get_run(dead.info.run_id).info.status == "KILLED"


def test_up_revives_a_server_that_died_and_leaves_the_others_alone(stack, client):
    mlflow = psutil.Process(stack.pids["mlflow"])
    for process in [mlflow, *mlflow.children(recursive=True)]:
        process.kill()
    while mlflow.is_running() and mlflow.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert local.current() is None
    assert {server.name: server.alive for server in local.status()} == {"ray": True, "mlflow": False, "s3": True}
    found = host_findings(client())
    assert {name for name, finding in found.items() if finding.state == "fail"} == {"local stack", "MLflow"}
    assert f"tessera up --data {stack.data}" in found["local stack"].cure
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
