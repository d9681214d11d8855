"""What a job runs: the tracked files of this checkout as they are now, with config and lock; and its identity."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.credentials import check_file, own_secrets
from datasets_prep.errors import UserError
from service.config import RunConfig

ROOMS = ("service", "jobs", "cluster", "datasets_prep")
FILE_LIMIT, SIZE_LIMIT = 50 << 20, 500 << 20
CONFIG_NAME, LOCK_NAME, PATCH_NAME, ORIGIN_NAME = "run.json", "requirements.lock", "changes.patch", "origin.json"
ROOT = Path(__file__).resolve().parent.parent
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date that a zip can hold


@dataclass(frozen=True)
class Code:
    """The files that a job will run, checked for size and secrets.

    Args:
        files: by '/'-separated name, either where they lie or their contents.
        hash: of what decides what a run computes, 12 hex digits.
        commit: of the checkout, with `+` when tracked files differ from it; None where there is none.
        untracked: Python and YAML files of the rooms that git does not track, which are left out.
    """

    files: Mapping[str, Path | bytes]
    hash: str
    commit: str | None
    untracked: list[str]


@dataclass(frozen=True)
class Package:
    """A zip ready to submit: its file, bytes, and the SHA-256 of what is in it."""

    path: Path
    size: int
    sha: str


def code_hash(root: Path = ROOT) -> str:
    """Hash of the code that decides what a run computes: the rooms' Python and YAML files, wherever they lie."""
    return _code_hash({name: root / name for name in _of_rooms(root)})


def _code_hash(files: Mapping[str, Path | bytes]) -> str:
    whole = hashlib.sha256()
    for path in sorted(PurePosixPath(name) for name in files):
        if path.parts[0] in ROOMS and path.suffix in (".py", ".yaml"):
            data = read(files[str(path)])
            whole.update(f"{path}\0{len(data)}\0".encode())
            whole.update(data)
    return whole.hexdigest()[:12]


def run_name(config: RunConfig, fingerprint: str, code: str) -> str:
    """Name that the same recipe, settings, data, initial weights and code always get, however carried out."""
    return f"{config.name}-{digest([config.identity(), fingerprint, code])}"


def digest(plain: Any) -> str:
    """Short hash of a plain value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def commit(root: Path = ROOT) -> str | None:
    """Commit of the code at `root`, a checkout or a package: marked `+` when files differ from it; None for neither."""
    if _is_unpacked(root):
        return json.loads((root / ORIGIN_NAME).read_text())["commit"]
    if not _is_checkout(root) or not _git(root, "rev-list", "-n1", "--all").strip():
        return None
    head = _git(root, "rev-parse", "HEAD").decode().strip()
    return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no").strip() else "")


def patch(root: Path = ROOT) -> bytes | None:
    """What tracked files change in the commit, as `git apply` takes it; None without changes or commit."""
    if _is_unpacked(root):
        return (root / PATCH_NAME).read_bytes() if (root / PATCH_NAME).is_file() else None
    if not (commit(root) or "").endswith("+"):
        return None
    return _git(root, "diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")


def collect(root: Path = ROOT) -> Code:
    """Find what a job runs: tracked files, what they change in the commit, and a lock.

    Raises:
        UserError: a file is too large, or holds a secret.
    """
    names, untracked = _names(root)
    files: dict[str, Path | bytes] = {name: root / name for name in names}
    origin = commit(root)
    files[ORIGIN_NAME] = json.dumps({"commit": origin}).encode()
    if changes := patch(root):
        files[PATCH_NAME] = changes
    if LOCK_NAME not in files:
        files[LOCK_NAME] = installed().encode()
    _check_sizes({name: size(file) for name, file in files.items()})
    own = own_secrets(os.environ)
    for name, file in files.items():
        check_file(name, read(file), own)
    return Code(files, _code_hash(files), origin, untracked)


def write(code: Code, documents: Mapping[str, bytes], path: Path) -> Package:
    """Write code and `documents`, such as `run.json`, as a zip; the same contents make the same bytes.

    Args:
        code: of `collect`.
        documents: more files by name.
        path: of the zip.
    """
    digest, total = hashlib.sha256(), 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted({**code.files, **documents}.items()):
            data, rights = read(file), mode(file)
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, rights << 16
            archive.writestr(entry, data)
            digest.update(f"{name}\0{rights:o}\0{len(data)}\0".encode())
            digest.update(data)
            total += len(data)
    return Package(path, total, digest.hexdigest())


def config_document(config: RunConfig) -> dict[str, bytes]:
    """The document that `python -m jobs.train run.json` reads."""
    return {CONFIG_NAME: json.dumps(config.plain(), indent=1).encode()}


def installed() -> str:
    """A lock of what is installed beside this process, as `pip install -r` takes it."""
    found = {each.metadata["Name"].lower(): each.version for each in distributions() if each.metadata["Name"]}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found) if name != "tessera-jepa")


def _check_sizes(sizes: Mapping[str, int]) -> None:
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
    if sizes[largest[0]] > FILE_LIMIT:
        raise UserError(
            f"the package would hold {largest[0]} of {sizes[largest[0]] / 2**20:.1f} MiB, the limit of a file is "
            f"{FILE_LIMIT >> 20} MiB: take it out of git and keep data and weights in the object store"
        )
    if (total := sum(sizes.values())) > SIZE_LIMIT:
        raise UserError(
            f"the package would be {total / 2**20:.1f} MiB, the limit is {SIZE_LIMIT >> 20} MiB: "
            f"take large files out of git, the largest are {', '.join(largest)}"
        )


def _names(root: Path) -> tuple[list[str], list[str]]:
    """Files to pack, relative to `root`, and untracked Python and YAML files that stay behind."""
    if not _is_checkout(root):  # an installed package, or one unpacked
        own = (LOCK_NAME, PATCH_NAME, "pyproject.toml") if _is_unpacked(root) else ()
        return sorted([*_of_rooms(root), *(name for name in own if (root / name).is_file())]), []
    tracked = [name for name in _listed(root) if (root / name).is_file()]
    others = _listed(root, "--others", "--exclude-standard", "--", *ROOMS)
    return tracked, [name for name in others if name.endswith((".py", ".yaml"))]


def _of_rooms(root: Path) -> Sequence[str]:
    found = (p for room in ROOMS for p in (root / room).rglob("*") if p.suffix in (".py", ".yaml"))
    return [path.relative_to(root).as_posix() for path in found]


def _is_unpacked(root: Path) -> bool:
    return (root / ORIGIN_NAME).is_file()


def _is_checkout(root: Path) -> bool:
    try:
        top = _git(root, "rev-parse", "--show-toplevel").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return False
    return Path(top).resolve() == root.resolve()


def _listed(root: Path, *options: str) -> list[str]:
    return [name for name in _git(root, "ls-files", "-z", *options).decode().split("\0") if name]


def _git(root: Path, *args: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True).stdout


def read(file: Path | bytes) -> bytes:
    """Contents of a file of a package."""
    return file if isinstance(file, bytes) else file.read_bytes()


def size(file: Path | bytes) -> int:
    """Bytes of a file of a package."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def mode(file: Path | bytes) -> int:
    """Permissions of a file of a package, of which only that to execute it counts."""
    return 0o755 if isinstance(file, Path) and file.stat().st_mode & 0o100 else 0o644
