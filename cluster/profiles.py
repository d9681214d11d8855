"""Where a job can run: a named profile of `profiles/`, a file of one's own, or the address of a Ray job API."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster import address as ray
from cluster import local
from cluster.credentials import check_address, check_settings
from cluster.hardware import GPUS, Count, Frozen, Interconnect, Node, NonNegative, Precision, this_node
from datasets_prep.errors import UserError

__all__ = ["GPUS", "Located", "Profile", "ProfileFile", "ask", "locate", "names", "read", "resolve"]

_FOLDER = Path(__file__).with_name("profiles")
_LOCAL_STACK = "local stack"
_THIS_MACHINE = "this machine"
_SCHEMES = ("http://", "https://")
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


class Installed(Frozen):
    """The nodes have Tessera's packages already."""

    kind: Literal["installed"] = "installed"


class Packages(Frozen):
    """The packages of a lock are installed on the nodes."""

    kind: Literal["packages"] = "packages"
    lock: str = Field("requirements.lock", description="file of the checkout, as `pip install -r` takes it")


class Image(Frozen):
    """The nodes run in containers of an image, such as docker/train.Dockerfile makes."""

    kind: Literal["image"] = "image"
    image: str = Field(min_length=1, description="name that the nodes pull it by, with a tag or digest")


Runtime = Annotated[Installed | Packages | Image, Field(discriminator="kind")]


class ProfileFile(Frozen):
    """What a profile's file says of a cluster, whether or not it runs: no network was asked."""

    jobs_address: str | None = Field(
        None, description="Ray's job API, http://host:port; none: RAY_API_SERVER_ADDRESS of the environment"
    )
    nodes: Count
    node: Node
    interconnect: Interconnect = Interconnect()  # pyright: ignore[reportCallIssue]
    precision: Precision = Field("bf16", description="what the hardware is fastest in at no loss of range")
    storage_uri: str | None = Field(None, description="root of all runs; none: TESSERA_STORAGE of the environment")
    tracking_uri: str | None = Field(None, description="MLflow; none: MLFLOW_TRACKING_URI of the environment")
    runtime: Runtime = Installed()
    hosts: tuple[str, ...] = Field((), description="addresses of the nodes where they are known, the head first")
    ssh_user: str = Field("ubuntu", description="who may log in to the hosts")
    ssh_private_key: str | None = Field(None, description="file of the key to log in with, where `ray up` runs")
    env: dict[str, str] = Field({}, description="environment of every process of a job, such as NCCL_… and FI_…")
    secrets: tuple[str, ...] = Field((), description="names of environment variables whose values stay outside")
    price_per_node_hour: NonNegative | None = Field(None, description="of one node, in `currency`")
    currency: str = "USD"
    price_note: str | None = Field(None, description="where and when that price held")

    @field_validator("node", mode="before")
    @classmethod
    def _look_up(cls, value: Any) -> Any:
        return this_node() if value == _THIS_MACHINE else value

    @model_validator(mode="after")
    def _check(self) -> ProfileFile:
        for name in (*self.env, *self.secrets):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an environment variable: use capitals, digits and _")
        try:
            check_settings(self.model_dump())
        except UserError as error:
            raise ValueError(f"{error}; `secrets` names their variables, without the values") from None
        if (address := self.jobs_address) and address != _LOCAL_STACK and not address.startswith(_SCHEMES):
            raise ValueError(f"jobs_address={address} must begin with http:// or https://")
        if self.hosts and len(self.hosts) != self.nodes:
            raise ValueError(f"hosts={list(self.hosts)} names {len(self.hosts)} of nodes={self.nodes}: name each once")
        if self.nodes > 1 and self.interconnect.between == "none":
            raise ValueError(f"nodes={self.nodes} with interconnect.between=none: say what connects them")
        return self


class Profile(BaseModel):
    """A cluster that answers, and what talking to it takes.

    `env` is the environment of a client: Ray's token, S3 keys, addresses. `cpus` and `gpus` are those of all nodes.
    `file` is what its profile says, none for an address.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    jobs_address: str
    tracking_uri: str
    storage_uri: str
    env: dict[str, str]
    cpus: float
    gpus: float
    file: ProfileFile | None


def names() -> list[str]:
    """Profiles that ship with Tessera."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def describe(name: str) -> str:
    """First comment of a shipped profile, as one line."""
    return (_FOLDER / f"{name}.yaml").read_text().split("\n", 1)[0].lstrip("# ")


def read(name: str, overrides: Sequence[str] = ()) -> ProfileFile:
    """Read a shipped profile by name, or a YAML file by path, and apply `key.sub=value` overrides; asks no network.

    Raises:
        UserError: unknown profile, no such file, or one that says what it must not; all faults at once.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if path.parent == _FOLDER and path.stem not in names():
        known = " or ".join(names())
        raise UserError(f"--cluster {name}: unknown profile: use {known}, a file.yaml, or an address http://host:port")
    try:
        tree = yaml.safe_load(path.read_text())
        for override in overrides:
            tree = _overridden(tree, override)
        return ProfileFile.model_validate(tree)
    except FileNotFoundError:
        raise UserError(f"--cluster {name}: there is no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--cluster {name} is not valid YAML: {error}") from None
    except ValidationError as error:
        faults = [f"  {_explain(fault)}" for fault in error.errors()]
        raise UserError("\n".join([f"--cluster {name}: {len(faults)} fault(s) in the profile:", *faults])) from None


def _overridden(tree: Any, override: str) -> Any:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f"{override!r} is no override: write key.sub=value, such as node.cpus=8")
    first, dot, rest = key.partition(".")
    below: Any = tree if isinstance(tree, dict) else {}
    return below | {first: _overridden(below.get(first), f"{rest}={text}") if dot else _parsed(text)}


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _explain(fault: Mapping[str, Any]) -> str:
    """One line: dotted name, value, constraint."""
    dotted = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return f"{dotted} is no key of a profile; there are: {', '.join(ProfileFile.model_fields)}"
    given = "" if isinstance(fault["input"], dict) else f"={fault['input']!r}"
    return f"{dotted}{given}: {message}" if dotted else message


class Located(BaseModel):
    """Where a cluster is said to be, and what talking to it takes; nobody was asked."""

    model_config = ConfigDict(frozen=True)

    name: str
    jobs_address: str
    env: dict[str, str]
    file: ProfileFile | None


def resolve(cluster: str) -> Profile:
    """Find a cluster by profile name or file, or job API address (`http://host:port`), and ask what it has.

    Raises:
        UserError: unknown profile, no cluster there, wrong token, no MLflow or storage named, or a cluster that lacks
            what its profile says.
    """
    return ask(locate(cluster, local.current()))


def locate(cluster: str, stack: local.Stack | None) -> Located:
    """Find a cluster by profile name or file, or job API address, where `stack` is this machine's; asks nobody.

    Raises:
        UserError: unknown or faulty profile, no address or one with a password, no MLflow or storage named.
    """
    file = None if cluster.startswith(_SCHEMES) else read(cluster)
    address = (cluster if file is None else _address(cluster, file)).rstrip("/")
    check_address("--cluster" if file is None else "RAY_API_SERVER_ADDRESS", address)
    if stack is not None and address in (_LOCAL_STACK, stack.ray_address):
        address, env = stack.ray_address, local.client_environment(stack)
    elif address == _LOCAL_STACK:
        raise UserError(f"--cluster {cluster}: no stack runs on this machine: start it with `tessera up`")
    else:
        env = _environment(cluster, address, file)
    return Located(name=cluster, jobs_address=address, env=env, file=file)


def ask(located: Located) -> Profile:
    """Ask a cluster what it has.

    Raises:
        UserError: no cluster there, wrong token, or less than its profile says.
    """
    alive = (node for node in ray.nodes(located.jobs_address, located.env) if node["state"] == "ALIVE")
    nodes: list[dict[str, float]] = [node["resources_total"] for node in alive]
    file = located.file
    if file is not None and file.jobs_address != _LOCAL_STACK:
        _check_nodes(located.name, file, nodes)
    return Profile(
        name=located.name,
        jobs_address=located.jobs_address,
        tracking_uri=located.env["MLFLOW_TRACKING_URI"],
        storage_uri=located.env["TESSERA_STORAGE"],
        env=located.env,
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        file=file,
    )


def _address(cluster: str, file: ProfileFile) -> str:
    address = file.jobs_address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError(
            f"--cluster {cluster} says what the cluster is, and not where: set RAY_API_SERVER_ADDRESS="
            f"http://host:port, or jobs_address in a copy of the profile (`tessera cluster show {cluster}`)"
        )
    return address


def _environment(cluster: str, address: str, file: ProfileFile | None) -> dict[str, str]:
    """Take from the profile, else from this process's environment, what an address alone does not tell."""
    wanted = ("MLFLOW_TRACKING_URI", "TESSERA_STORAGE", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    env = {name: os.environ[name] for name in wanted if os.environ.get(name)}
    said = {} if file is None else {"MLFLOW_TRACKING_URI": file.tracking_uri, "TESSERA_STORAGE": file.storage_uri}
    env |= {name: value for name, value in said.items() if value}
    for name, example in (("MLFLOW_TRACKING_URI", "http://host:5000"), ("TESSERA_STORAGE", "s3://runs")):
        if name not in env:
            raise UserError(f"--cluster {cluster} needs {name} in the environment, such as {name}={example}")
    trusted = ray.ca_file(os.environ)
    return {
        "RAY_API_SERVER_ADDRESS": address,
        **({"RAY_AUTH_MODE": "token"} if ray.token(env) else {}),
        **(dict.fromkeys(ray.CA_VARIABLES, trusted) if trusted else {}),  # each library reads another one
        **env,
    }


def _check_nodes(cluster: str, file: ProfileFile, nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that as many nodes as the profile says have the CPUs and GPUs that it says."""
    wanted = file.node
    kind = GPUS[wanted.gpu].ray_type if wanted.gpu else None
    enough = [
        node
        for node in nodes
        if node.get("CPU", 0) >= wanted.cpus and node.get("GPU", 0) >= wanted.gpus and kind in (None, _gpu_type(node))
    ]
    if len(enough) < file.nodes:
        kinds = Counter(_described(node.get("CPU", 0), node.get("GPU", 0), _gpu_type(node)) for node in nodes)
        there = ", ".join(f"{count} of {each}" for each, count in kinds.items()) or "none"
        raise UserError(
            f"--cluster {cluster} says {file.nodes} nodes of {_described(wanted.cpus, wanted.gpus, kind)}; nodes of "
            f"the cluster: {there}: start what is missing, or name a profile that fits"
        )


def _gpu_type(node: Mapping[str, float]) -> str | None:
    """What Ray calls a node's GPUs; it gives their type as a resource."""
    return next((name.partition(":")[2] for name in node if name.startswith("accelerator_type:")), None)


def _described(cpus: float, gpus: float, kind: str | None) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs" + (f" ({kind})" if gpus and kind else "")
