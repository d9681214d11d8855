"""A Ray cluster of two hosts on one machine: network namespaces with addresses of their own, joined by a bridge.

MLflow and SeaweedFS run as real processes beside them and are reached at two more addresses; S3 requests pass a proxy
that can be told to spoil them. Where namespaces are not permitted, the hosts are two raylets at one address, which
`Cluster.kind` says. Everything ends with the block, by process id, and what an earlier owner that was killed left
behind is removed first.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import psutil

from cluster.local import process_tree
from tests.mlflow_server import MlflowServer
from tests.servers import S3, faulty_proxy, free_ports, seaweedfs

ROOT = Path(__file__).parents[3]
WITNESS = Path(__file__).with_name("witness")
LINK = "eth0"  # gloo finds the interface by name, so it is the same on both hosts
PREFIX = "tessera"
# Ray declares a silent node dead after some 4 s instead of 14 to 55.
HEALTH = {"period_ms": "1000", "failure_threshold": "4", "timeout_ms": "3000", "initial_delay_ms": "2000"}


class Unreachable(RuntimeError):
    """A server of the cluster did not come up."""


@dataclass
class Host:
    """One host: its address, how a command is started on it, and the process that holds its part of Ray."""

    name: str
    address: str
    namespace: str | None
    process: subprocess.Popen | None = None

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` on this host."""
        return [*(["nsenter", f"--net=/run/netns/{self.namespace}"] if self.namespace else []), *words]

    def pids(self) -> list[int]:
        """Processes that run on the host."""
        if self.namespace:
            listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
            return [int(pid) for pid in listed.stdout.split()]
        return [] if self.process is None else [each.pid for each in process_tree(self.process.pid)]

    def raylet(self) -> int:
        """Process id of the raylet."""
        return next(pid for pid in self.pids() if _name(pid) == "raylet")

    def kill(self) -> None:
        """End everything on the host at once, as a power cut would."""
        for _ in range(5):
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process is not None:
                self.process.wait()
            if not self.pids():
                break
            time.sleep(0.1)
        self.process = None


@dataclass
class Cluster:
    """What runs; `s3_fault(method, path)` may be set to spoil S3 requests, as in `tests.servers.faulty_proxy`."""

    folder: Path
    kind: str
    hosts: list[Host]
    env: dict[str, str]
    gcs: str
    dashboard: str
    cpus: int
    s3: S3
    mlflow: MlflowServer
    scratch: Path
    s3_fault: Callable[[str, str], int | None] = field(default=lambda method, path: None)

    @property
    def witness(self) -> Path:
        """Folder in which every training process notes its steps."""
        return Path(self.env["TESSERA_WITNESS"])

    def start(self, host: Host) -> None:
        """Start a host's part of Ray: the head on the first, a raylet that joins it on others."""
        head = host is self.hosts[0]
        port = self.gcs.rsplit(":", 1)[1]
        dashboard = self.dashboard.rsplit(":", 1)[1]
        joins = ["--head", f"--port={port}", f"--temp-dir={self.scratch}"]
        joins += [f"--dashboard-host={host.address}", f"--dashboard-port={dashboard}"]
        command = host.command(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(joins if head else [f"--address={self.gcs}"]),
            *(f"--node-ip-address={host.address}", f"--num-cpus={self.cpus}", "--object-store-memory=100000000"),
            f"--dashboard-agent-listen-port={free_ports(1)[0]}",
        )
        env = self.env | {"TESSERA_CACHE": str(self.folder / f"cache-{host.name}")}
        with (self.folder / f"{host.name}.log").open("ab") as log:
            host.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.folder)

    def wait(self, seconds: float = 90) -> None:
        """Return when every host has joined."""
        end = time.monotonic() + seconds
        while self._alive() < len(self.hosts):
            if time.monotonic() > end:
                raise Unreachable(f"of {len(self.hosts)} hosts {self._alive()} joined within {seconds:.0f} s")
            time.sleep(0.3)

    def _alive(self) -> int:
        """Nodes that Ray counts as alive."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes", headers=headers)
        with suppress(OSError, ValueError, KeyError, HTTPException):
            with urllib.request.urlopen(request, timeout=3) as answer:
                return sum(node["state"] == "ALIVE" for node in json.load(answer)["data"]["result"]["result"])
        return 0


@contextmanager
def cluster(folder: Path, cpus: int = 1) -> Iterator[Cluster]:
    """Two hosts of `cpus` CPUs each, MLflow and S3, with logs and data below `folder`."""
    _sweep()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        (storage, tracking), hosts, kind = stack.enter_context(_network())
        s3 = stack.enter_context(seaweedfs(folder / "s3"))
        gcs, dashboard = (f"{hosts[0].address}:{port}" for port in free_ports(2))
        (folder / "mlflow").mkdir(exist_ok=True)
        mlflow = MlflowServer(folder / "mlflow", tracking)
        scratch = Path(tempfile.mkdtemp(prefix="tessera-ray-"))  # the path of a socket is 107 characters at most
        made = Cluster(folder, kind, hosts, {}, gcs, f"http://{dashboard}", cpus, s3, mlflow, scratch)
        proxy = stack.enter_context(faulty_proxy(s3, lambda method, path: made.s3_fault(method, path), host=storage))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        stack.callback(mlflow.kill)
        for host in hosts:
            stack.callback(host.kill)
        made.env.update(_cluster_environment(folder, proxy, mlflow.uri, bool(hosts[0].namespace)))
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(mlflow.start)
            made.start(hosts[0])
            _until_listening(made.gcs)
            made.start(hosts[1])
            made.wait()
            starting.result()
        yield made


def _cluster_environment(folder: Path, s3: S3, mlflow: str, namespaces: bool) -> dict[str, str]:
    """Environment of all processes of the cluster: addresses, keys, Ray's token, and the witness."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "TESSERA_"))}
    network = {"GLOO_SOCKET_IFNAME": LINK, "NCCL_SOCKET_IFNAME": LINK} if namespaces else {}
    return {
        **kept,
        **network,
        **s3.env(),
        **{f"RAY_health_check_{name}": value for name, value in HEALTH.items()},
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(WITNESS), str(ROOT)]),
        "TESSERA_WITNESS": str(folder / "witness"),
        "TESSERA_STORAGE": f"s3://{s3.bucket}/runs",
        "MLFLOW_TRACKING_URI": mlflow,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _until_listening(address: str, seconds: float = 60) -> None:
    host, port = address.rsplit(":", 1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.1)
    raise Unreachable(f"nothing listens at {address} after {seconds:.0f} s")


@contextmanager
def _network() -> Iterator[tuple[tuple[str, str], list[Host], str]]:
    """Addresses at which both hosts reach storage and MLflow, the hosts, and what they are."""
    names = ("a", "b")
    base = f"{PREFIX}{os.getpid()}"
    subnet = f"10.213.{os.getpid() % 250}"
    with ExitStack() as stack:
        try:
            _ip("link", "add", base, "type", "bridge")
            stack.callback(_ip, "link", "del", base)
            servers = f"{subnet}.254", f"{subnet}.253"
            for address in servers:
                _ip("addr", "add", f"{address}/24", "dev", base)
            _ip("link", "set", base, "up")
            hosts = [stack.enter_context(_namespace(base, n, f"{subnet}.{i}")) for i, n in enumerate(names, 1)]
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            kind = f"two raylets at one address, as network namespaces are not permitted here ({reason.strip()})"
            print(f"chaos: {kind}", file=sys.stderr)
            hosts = [Host(name, "127.0.0.1", None) for name in names]
            yield ("127.0.0.1", "127.0.0.1"), hosts, kind
        else:
            yield servers, hosts, "two network namespaces with addresses of their own"


@contextmanager
def _namespace(bridge: str, name: str, address: str) -> Iterator[Host]:
    namespace, outside = f"{bridge}-{name}", f"{bridge}{name}"
    _ip("netns", "add", namespace)
    try:
        _ip("link", "add", outside, "type", "veth", "peer", "name", LINK, "netns", namespace)
        _ip("link", "set", outside, "master", bridge, "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", LINK)
        for link in (LINK, "lo"):
            _ip("-n", namespace, "link", "set", link, "up")
        gateway = f"{address.rpartition('.')[0]}.254"  # leads nowhere, but by its route Ray finds the host's address
        _ip("-n", namespace, "route", "add", "default", "via", gateway)
        for server in _name_servers():  # else who looks a name up waits ten seconds for what nobody answers
            _ip("-n", namespace, "route", "add", "unreachable", server)
        yield Host(name, address, namespace)
    finally:
        _ip("netns", "del", namespace)


def _name_servers() -> list[str]:
    path = Path("/etc/resolv.conf")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [words[1] for words in map(str.split, lines) if words[:1] == ["nameserver"]]
    return [server for server in found if ":" not in server]  # the hosts have no IPv6


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _sweep() -> None:
    """Remove hosts whose owner was killed, with all that still runs on them."""
    for path in Path("/run/netns").glob(f"{PREFIX}[0-9]*-?"):
        bridge = path.name[:-2]
        if psutil.pid_exists(int(bridge.removeprefix(PREFIX))):
            continue
        Host(path.name[-1], "", path.name).kill()
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", path.name)
            _ip("link", "del", bridge)


def runs(pid: int) -> bool:
    """Whether a process has not ended, reaped or not."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _name(pid: int) -> str:
    with suppress(psutil.Error):
        return psutil.Process(pid).name()
    return ""
