"""Where a job can run: a named profile of `profiles/`, or the address of a Ray cluster's job API."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from cluster import local
from datasets_prep.errors import UserError

_FOLDER = Path(__file__).with_name("profiles")
_LOCAL_STACK = "local stack"
_SECONDS = 5.0


class ProfileFile(BaseModel):
    """What a profile's file says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jobs_address: str


class Profile(BaseModel):
    """A cluster that answers, and what talking to it takes.

    `env` is the environment of a client: Ray's token, S3 keys, addresses. `cpus` and `gpus` are those of all nodes.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    jobs_address: str
    tracking_uri: str
    storage_uri: str
    env: dict[str, str]
    cpus: float
    gpus: float


def resolve(cluster: str) -> Profile:
    """Find a cluster by profile name (`local`) or job API address (`http://host:port`), and ask what it has.

    Raises:
        UserError: unknown profile, no cluster there, wrong token, or no MLflow or storage named for an address.
    """
    address = cluster.rstrip("/") if cluster.startswith(("http://", "https://")) else _read(cluster).jobs_address
    stack = local.current()
    if stack is not None and address in (_LOCAL_STACK, stack.ray_address):
        address, env = stack.ray_address, local.client_environment(stack)
    elif address == _LOCAL_STACK:
        raise UserError(f"--cluster {cluster}: no stack runs on this machine: start it with `tessera up`")
    else:
        env = _environment(address)
    resources = _resources(address, env)
    return Profile(
        name=cluster,
        jobs_address=address,
        tracking_uri=env["MLFLOW_TRACKING_URI"],
        storage_uri=env["TESSERA_STORAGE"],
        env=env,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
    )


def _read(name: str) -> ProfileFile:
    path = _FOLDER / f"{name}.yaml"
    known = sorted(file.stem for file in _FOLDER.glob("*.yaml"))
    if name not in known:
        raise UserError(f"--cluster {name}: unknown profile: use {' or '.join(known)}, or an address http://host:port")
    return ProfileFile.model_validate(yaml.safe_load(path.read_text()))


def _environment(address: str) -> dict[str, str]:
    """Take from this process's environment what an address alone does not tell."""
    for name, example in (("MLFLOW_TRACKING_URI", "http://host:5000"), ("TESSERA_STORAGE", "s3://runs")):
        if not os.environ.get(name):
            raise UserError(f"--cluster {address} needs {name} in the environment, such as {name}={example}")
    wanted = ("MLFLOW_TRACKING_URI", "TESSERA_STORAGE", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    env = {name: os.environ[name] for name in wanted if os.environ.get(name)}
    return {"RAY_API_SERVER_ADDRESS": address, **({"RAY_AUTH_MODE": "token"} if _token(env) else {}), **env}


def _token(env: Mapping[str, str]) -> str | None:
    """Find Ray's token as Ray itself does: variable, named file, file in the home folder."""
    if env.get("RAY_AUTH_MODE", "token") != "token":
        return None
    if token := env.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(env.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def _resources(address: str, env: Mapping[str, str]) -> dict[str, float]:
    """Sum the resources of the cluster's live nodes; the question proves address and token."""
    token = _token(env)
    request = urllib.request.Request(f"{address}/api/v0/nodes?detail=true")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            nodes: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"Ray at {address} refused the token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
            ) from error
        raise UserError(f"{address} answered {error.code}: is this the address of Ray's dashboard?") from error
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"no Ray cluster at {address} ({reason}): check host and port of its dashboard") from error
    total: dict[str, float] = {}
    for node in nodes:
        if node["state"] == "ALIVE":
            for name, amount in node["resources_total"].items():
                total[name] = total.get(name, 0.0) + amount
    return total
