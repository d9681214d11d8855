"""Runs a Dockerfile's instructions in plain folders, by chroot, where there is no container engine.

It takes the instructions that our Dockerfiles use and refuses others; layers, caching and BuildKit's own features are
not imitated. The base is a Debian made by debootstrap with python3, in place of the image that `BASE` names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

MIRROR = "http://deb.debian.org/debian"
# How this machine reaches package registries, which is no part of an image.
NETWORK = ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "PIP_CERT", "PIP_INDEX_URL", "UV_DEFAULT_INDEX")


@dataclass
class Stage:
    """A root file system and what later instructions run with."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"})
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "0"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, *command: str) -> str:
        """Run a command in this root as its user; returns what it printed, raises when it fails."""
        outside = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        env = {"HOME": "/root", "DEBIAN_FRONTEND": "noninteractive", **outside, **self.env}
        # In a mount namespace of its own, so that /proc and /dev go with the command.
        mounts = f"mount -t proc proc {self.root}/proc && mount --rbind /dev {self.root}/dev"
        enter = f'chroot --userspec={self.user}:{self.user} {self.root} /bin/sh -c \'cd "$0" && exec "$@"\''
        line = f"{mounts} && exec {enter} {shlex.quote(self.folder)} {shlex.join(command)}"
        done = subprocess.run(["unshare", "--mount", "sh", "-c", line], env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Read a Dockerfile as (instruction, rest of its line), continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(word, rest) for word, rest in pairs]


def debian(root: Path) -> None:
    """Make a small Debian with python3, and a python3 that finds no packages of the machine."""
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root), MIRROR], check=True, capture_output=True)
    _connect(root)
    stage = Stage(root)
    stage.run("apt-get", "update")
    stage.run("apt-get", "install", "--yes", "--no-install-recommends", "python3", "python3-venv", "python3-dev")
    _connect(root)  # the packages brought certificates of their own


def _connect(root: Path) -> None:
    for path in filter(os.path.exists, NETWORK):
        target = root / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--dereference", "--remove-destination", path, str(target)], check=True)


def build(dockerfile: Path, context: Path, base: Path, work: Path) -> Stage:
    """Carry out every instruction of a Dockerfile, and return its last stage."""
    building = _Build(context, base, work)
    for word, rest in instructions(dockerfile):
        if not hasattr(building, word):
            raise ValueError(f"{word} is not imitated")
        getattr(building, word)(rest)
    return building.stage


class _Build:
    """A build as far as it has come; a method an instruction."""

    def __init__(self, context: Path, base: Path, work: Path) -> None:
        self.context, self.base, self.work = context, base, work
        self.stages: dict[str, Stage] = {}
        self.args: dict[str, str] = {}
        self.stage = Stage(base)

    def ARG(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.args[name] = value

    def FROM(self, rest: str) -> None:
        name = rest.split(" AS ")[1] if " AS " in rest else f"stage{len(self.stages)}"
        self.stage = self.stages[name] = Stage(self.work / name)
        subprocess.run(["cp", "-a", "--reflink=auto", str(self.base), str(self.stage.root)], check=True)

    def COPY(self, rest: str) -> None:
        words = rest.split()
        other = self.stages[words.pop(0).removeprefix("--from=")].root if words[0].startswith("--from=") else None
        *sources, target = words
        place = self.stage.root / os.path.join(self.stage.folder, target)[1:]
        for source in sources:
            path = (other or self.context) / source.lstrip("/")
            if path.is_dir():
                left_out = shutil.ignore_patterns() if other else shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True, ignore=left_out)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place / path.name)

    def RUN(self, rest: str) -> None:
        with_args = replace(self.stage, env={**self.args, **self.stage.env})
        with_args.run(*self.stage.shell, rest)

    def ENV(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self.stage.env[name] = value.replace("$PATH", self.stage.env["PATH"])

    def SHELL(self, rest: str) -> None:
        self.stage.shell = json.loads(rest)

    def ENTRYPOINT(self, rest: str) -> None:
        self.stage.entrypoint = json.loads(rest)

    def CMD(self, rest: str) -> None:
        self.stage.command = json.loads(rest)

    def WORKDIR(self, rest: str) -> None:
        self.stage.folder = rest
        (self.stage.root / rest[1:]).mkdir(parents=True, exist_ok=True)

    def USER(self, rest: str) -> None:
        self.stage.user = rest

    def EXPOSE(self, rest: str) -> None:
        """Says, and does nothing."""
