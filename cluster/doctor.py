"""What can be wrong with a host or a cluster, found out before a job is tried: facts of a host, and judgements of them.

Facts are plain JSON, as they travel from nodes through a job's log. A judgement is a pure function from facts to a
`Finding`.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from cluster.hardware import Interconnect
from datasets_prep.errors import UserError

State = Literal["ok", "warn", "fail", "skipped"]

SHM = Path("/dev/shm")
_GIB = 2**30
_LEAST_DISK, _LITTLE_DISK, _FULL = _GIB, 10 * _GIB, 0.95  # from this share on Ray spills no objects to disk
_LEAST_SHM, _LITTLE_SHM = 64 * 2**20, _GIB  # 64 MiB is what a container has unless told otherwise
_SLOW_STORE, _FAR_CLOCK, _WRONG_CLOCK = 0.5, 2.0, 30.0  # seconds; a lease is lost after 60 s of silence
_SOON = 86400.0
_LEAST_OF_LINK = 0.5  # share of the stated bandwidth
_PCIE = 31.5e9  # bytes a second of 16 lanes of PCIe 4.0, one way
_LEAST_OF_MEMORY = 0.9  # share of the stated memory: drivers keep some
_DISTRIBUTION = "tessera-jepa"
_COMPARED = ("ray", "torch", "mlflow", "obstore", "numpy", "pydantic")
_SECONDS = 5.0
_DATE_SECONDS = 2.0  # a page's date is cut off to a second, and servers reuse it for one
_SESSION = "--session-name="


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it stands, what was found, and the cure unless all is well."""

    name: str
    state: State
    found: str
    cure: str = ""


def failed(name: str, error: UserError) -> Finding:
    """Finding of an error, whose message ends with its cure, after a colon."""
    found, colon, cure = " ".join(str(error).split()).rpartition(": ")
    return Finding(name, "fail", found if colon else cure, cure if colon else "")


# Facts of a host


def examine(folders: Iterable[Path] = ()) -> dict[str, Any]:
    """Facts of this host: versions, free bytes below `folders` and the temporary folder, GPUs, Rays, the clock."""
    places = {Path(tempfile.gettempdir()), *folders}
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version for name in _COMPARED if (version := _version(name))},
        "disks": [[str(place), *_space(place)] for place in sorted(places)],
        "shm": _space(SHM) if SHM.is_dir() else None,
        "gpus": gpus(),
        "rays": rays(),
        "time": time.time(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _space(place: Path) -> tuple[int, int]:
    """Free and total bytes of the file system that holds a folder, which need not exist yet."""
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return usage.free, usage.total


def gpus() -> list[dict[str, Any]]:
    """Name, memory in MiB and driver of each GPU, as nvidia-smi lists them; none without it."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.strip()]
    return [{"name": name, "memory_mib": memory, "driver": driver} for name, memory, driver in rows]


def rays() -> dict[str, list[int]]:
    """Process ids of the Rays that share this host's network, by the session they belong to."""
    found: dict[str, list[int]] = {}
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        if process.info["name"] in ("gcs_server", "raylet") and process.info["status"] != psutil.STATUS_ZOMBIE:
            words: list[str] = process.info["cmdline"] or []
            names = [word.removeprefix(_SESSION) for word in words if word.startswith(_SESSION)]
            if names and _same_network(process.pid):
                found.setdefault(names[0], []).append(process.pid)
    return found


def _same_network(pid: int) -> bool:
    """Say whether a process lives in our network namespace, as far as we may know."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    except PermissionError:
        return True
    except OSError:
        return False


def http_offset(url: str) -> tuple[float, float] | None:
    """Seconds by which a web server's clock is ahead of ours, and their uncertainty; None if it does not tell."""
    before = time.time()
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            said = str(answer.headers.get("Date"))
    except urllib.error.HTTPError as refusal:
        said = str(refusal.headers.get("Date"))
    except (OSError, ValueError):
        return None
    after = time.time()
    with suppress(ValueError):
        return offset(parsedate_to_datetime(said).timestamp(), before, after, _DATE_SECONDS)
    return None


def offset(there: float, before: float, after: float, resolution: float = 0.0) -> tuple[float, float]:
    """Seconds by which a clock is ahead that showed `there` between our `before` and `after`, and the uncertainty.

    A clock that cuts off to a `resolution` may have been that much further.
    """
    least, most = there - after, there + resolution - before
    return (least + most) / 2, (most - least) / 2


# Judgements


def judge_packages(requirements: Sequence[str] | None, versions: Callable[[str], str | None] = _version) -> Finding:
    """Judge this host's packages by what the project asks for."""
    about = f"Python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n in _COMPARED if (v := versions(n)))
    if requirements is None:
        return Finding("packages", "warn", f"{about}; {_DISTRIBUTION} is not installed", "`make setup`")
    wrong: list[str] = []
    for line in requirements:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            there = versions(wanted.name)
            if there is None:
                wrong.append(f"{wanted.name} is missing")
            elif not wanted.specifier.contains(there, prereleases=True):
                wrong.append(f"{wanted.name} {there} is not {wanted.specifier}")
    if wrong:
        return Finding("packages", "fail", "; ".join(wrong), "install the locked packages: `make setup`")
    return Finding("packages", "ok", about)


def installed_requirements() -> list[str] | None:
    """What the installed project asks for, None if it is not installed."""
    try:
        return importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def judge_disks(hosts: Sequence[Mapping[str, Any]]) -> Finding:
    """Judge the file systems of all hosts by the fullest one."""
    rows = [(free, total, f"{path} of {host['host']}") for host in hosts for path, free, total in host["disks"]]
    free, total, where = min(rows, key=lambda row: (_disk_state(*row[:2]) == "ok", row[0]))
    state = _disk_state(free, total)
    return Finding(
        "disk",
        state,
        f"{_size(free)} free of {_size(total)} in {where}",
        ""
        if state == "ok"
        else "free space (`tessera gc` lists what dead runs left), or set TMPDIR, TESSERA_CACHE "
        "or TESSERA_STORAGE to a larger file system",
    )


def _disk_state(free: int, total: int) -> State:
    if free < _LEAST_DISK:
        return "fail"
    return "warn" if free < _LITTLE_DISK or free < (1 - _FULL) * total else "ok"


def judge_shm(hosts: Sequence[Mapping[str, Any]]) -> Finding:
    """Judge the shared memory of all hosts by the smallest: Ray and NCCL pass data between processes through it."""
    rows = [(*host["shm"], host["host"]) for host in hosts if host["shm"]]
    if not rows:
        return Finding("shared memory", "skipped", f"no host has {SHM}")
    free, total, where = min(rows)
    state: State = "fail" if free < _LEAST_SHM else "warn" if free < _LITTLE_SHM else "ok"
    found = f"{_size(free)} free of {_size(total)} in {SHM} of {where}"
    cure = f"remove what fills {SHM}, or start the container with --shm-size=8g (Kubernetes: emptyDir, medium: Memory)"
    return Finding("shared memory", state, found, "" if state == "ok" else cure)


def judge_rays(hosts: Sequence[Mapping[str, Any]]) -> Finding:
    """Judge whether hosts carry one Ray at most: two mistake each other's placement groups and ports for their own."""
    for host in hosts:
        if len(host["rays"]) > 1:
            each = "; ".join(
                f"{name} (processes {', '.join(map(str, pids))})" for name, pids in sorted(host["rays"].items())
            )
            cure = "end the one you do not need by its process ids; `ray stop` ends all of them"
            return Finding("one Ray", "fail", f"{host['host']} carries {len(host['rays'])} Rays: {each}", cure)
    count = sum(len(host["rays"]) for host in hosts)
    return Finding("one Ray", "ok", f"{count} on {len(hosts)} host{'s' * (len(hosts) > 1)}")


def judge_clock(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """Judge clocks by the furthest one; `offsets` are seconds ahead of ours and their uncertainty, by name."""
    if not offsets:
        return Finding("clock", "skipped", "nobody told the time")
    certain = {name: max(abs(ahead) - unsure, 0.0) for name, (ahead, unsure) in offsets.items()}
    name = max(certain, key=lambda each: certain[each])
    state: State = "fail" if certain[name] > _WRONG_CLOCK else "warn" if certain[name] > _FAR_CLOCK else "ok"
    ahead, unsure = offsets[name]
    found = f"{name} is {abs(ahead):.2f} ± {unsure:.2f} s {'ahead' if ahead >= 0 else 'behind'}"
    cure = "synchronise the clocks (chrony or systemd-timesyncd): leases and S3 signatures compare times of hosts"
    return Finding("clock", state, found, "" if state == "ok" else cure)


def judge_versions(here: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> Finding:
    """Judge whether all nodes have the client's versions: pickled functions and job interfaces depend on them."""
    grave, slight = _differences(here, nodes)
    if not grave and not slight:
        versions = f"Python {here['python']}, " + ", ".join(f"{n} {v}" for n, v in here["packages"].items())
        return Finding("same versions", "ok", f"{versions} everywhere")
    cure = "install requirements.lock on every host, or give the profile an image that has it"
    return Finding("same versions", "fail" if grave else "warn", "; ".join(grave + slight), cure)


def _differences(here: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """What differs between client and nodes: in Ray, torch or the minor version of Python, and otherwise."""
    grave: list[str] = []
    slight: list[str] = []
    for node in nodes:
        if node["python"] != here["python"]:
            minor = node["python"].rsplit(".", 1)[0] == here["python"].rsplit(".", 1)[0]
            text = f"Python {node['python']} on {node['host']}, {here['python']} here"
            (slight if minor else grave).append(text)
        for name in sorted({*here["packages"], *node["packages"]}):
            mine, theirs = here["packages"].get(name, "none"), node["packages"].get(name, "none")
            if mine != theirs:
                severe = grave if name in ("ray", "torch") else slight
                severe.append(f"{name} {theirs} on {node['host']}, {mine} here")
    return grave, slight


def judge_gpus(nodes: Sequence[Mapping[str, Any]], memory_gib: float | None = None) -> Finding:
    """Judge whether the driver shows the GPUs that Ray hands out, all of one driver.

    Args:
        nodes: facts of nodes; `ray_gpus` is Ray's count.
        memory_gib: of each GPU, as plans reckon with it; none: unknown.
    """
    handed_out = int(sum(node["ray_gpus"] for node in nodes))
    if not handed_out:
        idle = [f"{len(node['gpus'])} on {node['host']}" for node in nodes if node["gpus"]]
        if not idle:
            return Finding("GPUs", "skipped", "the cluster has none")
        return Finding("GPUs", "warn", f"Ray hands out none, there are {', '.join(idle)}", "start Ray with --num-gpus")
    for node in nodes:
        if node["ray_gpus"] and not node["gpus"]:
            found = f"Ray hands out {node['ray_gpus']:g} GPUs of {node['host']}, and nvidia-smi shows none there"
            return Finding("GPUs", "fail", found, "install the NVIDIA driver (in containers: the container toolkit)")
        if len(node["gpus"]) < node["ray_gpus"]:
            found = f"Ray hands out {node['ray_gpus']:g} GPUs of {node['host']}, nvidia-smi shows {len(node['gpus'])}"
            return Finding("GPUs", "fail", found, "a GPU has dropped out: `dmesg | grep -i xid`, then reset or reboot")
    each = [gpu for node in nodes for gpu in node["gpus"]]
    kinds = sorted({f"{gpu['name']} {int(gpu['memory_mib']) / 1024:.0f} GiB" for gpu in each})
    drivers = sorted({gpu["driver"] for gpu in each})
    found = f"{len(each)} × {', '.join(kinds)}, driver {', '.join(drivers)}"
    if memory_gib and min(int(gpu["memory_mib"]) for gpu in each) < _LEAST_OF_MEMORY * 1024 * memory_gib:
        cure = f"the profile says {memory_gib:g} GiB, and plans reckon with it: name the profile of these GPUs"
        return Finding("GPUs", "fail", found, cure)
    if len(drivers) > 1:
        return Finding("GPUs", "warn", found, "install one driver on all nodes: NCCL mixes them badly")
    return Finding("GPUs", "ok", found)


def judge_store(nodes: Sequence[Mapping[str, Any]], name: str = "storage from nodes") -> Finding:
    """Judge what each node's attempt at the object store gave: `store` holds seconds, `store_error` what failed."""
    for node in nodes:
        if error := node.get("store_error"):
            finding = failed(name, UserError(error))
            return Finding(name, "fail", f"{node['host']}: {finding.found}", finding.cure)
    slowest = max(nodes, key=lambda node: node["store"]["get"])
    seconds = slowest["store"]
    found = f"put {seconds['put'] * 1e3:.0f} ms, get {seconds['get'] * 1e3:.0f} ms on {slowest['host']}, the slowest"
    if max(seconds.values()) > _SLOW_STORE:
        return Finding(name, "warn", found, "move the store closer, or look for a busy link between it and the nodes")
    return Finding(name, "ok", found)


def bus_bandwidth(ranks: int, size: int, seconds: float) -> float:
    """Bytes a second that each link carries in a ring all-reduce of `size` bytes: 2 (n − 1) / n · size / seconds."""
    return 2 * (ranks - 1) / ranks * size / seconds


def judge_all_reduce(result: Mapping[str, Any], stated: Interconnect | None = None) -> Finding:
    """Judge an all-reduce between ranks by what a profile states of the links between them."""
    name = "all-reduce"
    if reason := result.get("skipped"):
        return Finding(name, "skipped", reason)
    cure = "open all ports between nodes, name their link in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, measure it"
    if error := result.get("error"):
        return Finding(name, "fail", f"{result['ranks']} ranks by {result['backend']}: {error}", cure)
    if not result["right"]:
        return Finding(name, "fail", f"{result['backend']} gives a wrong sum", "try NCCL_P2P_DISABLE=1; look for Xids")
    speed = bus_bandwidth(result["ranks"], result["bytes"], result["seconds"])
    found = (
        f"{result['ranks']} ranks on {result['nodes']} node{'s' * (result['nodes'] > 1)} by {result['backend']}: "
        f"{speed / 1e9:.2f} GB/s bus bandwidth ({result['bytes'] >> 20} MiB in {result['seconds'] * 1e3:.0f} ms)"
    )
    least, what = (0.0, "") if stated is None else _least_speed(result, stated)
    if speed < least:
        cure = f"the profile states {what}: NCCL_DEBUG=INFO and `nvidia-smi topo -m` tell which link is used"
        return Finding(name, "warn", found, cure)
    return Finding(name, "ok", found)


def _least_speed(result: Mapping[str, Any], stated: Interconnect) -> tuple[float, str]:
    """Bytes a second below which the stated links are not those in use, and what is stated."""
    if result["nodes"] > 1:
        between = stated.gbit_per_second
        return _LEAST_OF_LINK * between * 1e9 / 8, f"{between:g} Gbit/s between nodes"
    nvlink = stated.kind == "nvlink" and result["backend"] == "nccl"
    return _PCIE if nvlink else 0.0, "NVLink within a node, and this could be PCIe"


# Credentials


def token_end(token: str) -> float | None:
    """When a JSON Web Token ends, in seconds since 1970 (RFC 7519, `exp`); None for other tokens."""
    parts = token.strip().split(".")
    if len(parts) != 3:
        return None
    with suppress(ValueError, KeyError, TypeError):
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return float(claims["exp"])
    return None


def judge_end(name: str, what: str, end: float | None, now: float, renew: str) -> Finding:
    """Judge a credential by when it ends, in seconds since 1970; None for never."""
    if end is None:
        return Finding(name, "ok", what)
    if end <= now:
        return Finding(name, "fail", f"{what} ended {_span(now - end)} ago", renew)
    state: State = "warn" if end - now < _SOON else "ok"
    return Finding(name, state, f"{what} ends in {_span(end - now)}", renew if state == "warn" else "")


def judge_tokens(env: Mapping[str, str], now: float) -> list[Finding]:
    """Judge tokens that the environment holds, or whose file it names."""
    sources = (
        ("Ray token", "RAY_AUTH_TOKEN", env.get("RAY_AUTH_TOKEN")),
        ("Ray token", "RAY_AUTH_TOKEN_PATH", _read(env.get("RAY_AUTH_TOKEN_PATH"))),
        ("MLflow token", "MLFLOW_TRACKING_TOKEN", env.get("MLFLOW_TRACKING_TOKEN")),
    )
    return [
        judge_end(name, variable, token_end(token), now, f"fetch a new token for {variable}")
        for name, variable, token in sources
        if token
    ]


def _read(path: str | None) -> str | None:
    with suppress(OSError):
        return Path(path).read_text() if path else None
    return None


def judge_aws(env: Mapping[str, str], now: float) -> Finding:
    """Judge the S3 credentials that this environment leads to, without asking S3."""
    name = "S3 credentials"
    if env.get("AWS_ACCESS_KEY_ID"):
        if not env.get("AWS_SESSION_TOKEN"):
            return Finding(name, "ok", "AWS_ACCESS_KEY_ID, without an end")
        renew = "fetch new keys; long runs need a role or profile, whose keys are renewed (unset AWS_ACCESS_KEY_ID)"
        if end := env.get("AWS_CREDENTIAL_EXPIRATION"):
            with suppress(ValueError):
                return judge_end(name, "AWS_SESSION_TOKEN", datetime.fromisoformat(end).timestamp(), now, renew)
        return Finding(name, "warn", "AWS_SESSION_TOKEN ends at a time that nobody states", renew)
    if path := env.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        token = _read(path)
        if token is None:
            return Finding(name, "fail", f"AWS_WEB_IDENTITY_TOKEN_FILE={path} cannot be read", "mount the token there")
        finding = judge_end(name, "the web identity token", token_end(token), now, "look why its file is not renewed")
        return Finding(name, "ok", finding.found) if finding.state == "warn" else finding  # its file is renewed
    return _judge_chain(name)


def _judge_chain(name: str) -> Finding:
    """Judge what boto3's chain of profiles, processes and roles finds."""
    import boto3
    from botocore.exceptions import BotoCoreError

    cure = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    try:
        found: Any = boto3.Session().get_credentials()
        if found is None:
            return Finding(name, "fail", "none found", cure)
        found.get_frozen_credentials()  # asks a process or role for them
    except BotoCoreError as error:
        return Finding(name, "fail", " ".join(str(error).split()), cure)
    renewed = hasattr(found, "refresh_needed")
    return Finding(name, "ok", f"by {found.method}, {'renewed by themselves' if renewed else 'without an end'}")


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
