"""What a job runs: the tracked files of this checkout as they are now, plus the resolved config; and its identity."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from datasets_prep.errors import UserError
from service.config import RunConfig

ROOMS = ("service", "jobs", "cluster", "datasets_prep")
SIZE_LIMIT = 50 << 20
CONFIG_NAME = "run.json"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """A folder ready to submit.

    Args:
        folder: holds the code and `run.json`.
        size: bytes of all files.
        code: hash of the code that runs, 12 hex digits.
        commit: commit of the checkout, with `+` when tracked files differ from it; None outside git.
        untracked: Python files of the rooms that git does not track, which are left out.
    """

    folder: Path
    size: int
    code: str
    commit: str | None
    untracked: list[str]


def code_hash(root: Path = _ROOT) -> str:
    """Hash of the code that decides what a run computes: the rooms' Python and YAML files, wherever they lie."""
    digest = hashlib.sha256()
    for path in sorted(p for room in ROOMS for p in (root / room).rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_name(config: RunConfig, fingerprint: str, code: str) -> str:
    """Name that the same recipe, settings, data, initial weights and code always get, however carried out."""
    identity = json.dumps([config.identity(), fingerprint, code], sort_keys=True)
    return f"{config.name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def commit(root: Path = _ROOT) -> str | None:
    """Commit of the checkout at `root`, marked `+` when tracked files were changed; None where there is none."""
    try:
        head = _git(root, "rev-parse", "HEAD").strip()
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def build(config: RunConfig, folder: Path, root: Path = _ROOT) -> Package:
    """Copy what a job needs into `folder`; refuses more than 50 MiB."""
    files, untracked = _files(root)
    size = sum((root / name).stat().st_size for name in files)
    if size > SIZE_LIMIT:
        largest = sorted(files, key=lambda name: (root / name).stat().st_size, reverse=True)[:3]
        raise UserError(
            f"the code package would be {size / 2**20:.1f} MiB, the limit is {SIZE_LIMIT >> 20} MiB: "
            f"take large files out of git, the largest are {', '.join(largest)}"
        )
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, folder / name)
    text = json.dumps(config.plain(), indent=1)
    (folder / CONFIG_NAME).write_text(text)
    return Package(folder, size + len(text), code_hash(folder), commit(root), untracked)


def _files(root: Path) -> tuple[list[str], list[str]]:
    """Files to pack, relative to `root`, and untracked Python files that stay behind."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel").strip()) == root:
            tracked = [name for name in _git(root, "ls-files", "-z").split("\0") if name and (root / name).is_file()]
            others = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *ROOMS).split("\0")
            return tracked, [name for name in others if name.endswith((".py", ".yaml"))]
    except (OSError, subprocess.CalledProcessError):
        pass  # an installed package: take the rooms
    found = (p for room in ROOMS for p in (root / room).rglob("*") if p.suffix in (".py", ".yaml"))
    return sorted(p.relative_to(root).as_posix() for p in found), []


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True).stdout
