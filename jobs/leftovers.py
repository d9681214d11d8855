"""`tessera gc`: what dead runs left on hosts, in the storage of runs, in MLflow and in Ray; found, judged, removed.

Nothing of a run that a living driver holds is touched, nothing younger than the age that was asked for, and no folder
that a living process names.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import psutil

from cluster import profiles
from datasets_prep.errors import UserError
from jobs.probe import PLACE
from service.data.cache import beyond_budget
from service.data.store import Store, Unfinished
from service.engine import MARKER
from service.engine.lease import living_holder, newest_epoch

_SECONDS = 10.0  # after which a store that does not answer is given up


@dataclass(frozen=True)
class Leftover:
    """Something that nobody needs any more.

    Args:
        kind: what it is.
        where: its path, address or id.
        size: bytes, 0 where unknown.
        age: seconds since it was last written or used, None where unknown.
        remove: removes it, or raises when it has come to life or cannot be removed.
    """

    kind: str
    where: str
    size: int
    age: float | None
    remove: Callable[[], object] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Row:
    """A leftover and what became of it."""

    kind: str
    where: str
    host: str
    size: int
    age: float | None
    state: Literal["found", "removed", "kept"]
    reason: str = ""


def carry_out(leftovers: Iterable[Leftover], dry_run: bool, host: str = "") -> Iterator[Row]:
    """Remove leftovers, or only name them; one that cannot be removed is kept, with the reason."""
    for each in leftovers:
        state, reason = "found", ""
        if not dry_run:
            try:
                each.remove()
                state = "removed"
            except (OSError, UserError) as error:
                state, reason = "kept", str(error)
        yield Row(each.kind, each.where, host, each.size, each.age, state, reason)


Part = Callable[[], Iterable[Row]]


def parts(located: profiles.Located | None, older_than: float, cache_bytes: float, dry_run: bool) -> list[Part]:
    """What to collect, one part after the other: this host, the storage, MLflow and the nodes of a cluster.

    Args:
        located: the cluster, none for this host alone.
        older_than: seconds; what is younger is left alone.
        cache_bytes: of cached data that a host may keep.
        dry_run: only look.
    """
    here: list[Part] = [lambda: (Row(**row) for row in on_this_host(older_than, cache_bytes, dry_run))]
    if located is None:
        return here
    storage, uri = located.env["TESSERA_STORAGE"], located.env["MLFLOW_TRACKING_URI"]
    told = {"older_than": older_than, "cache_bytes": cache_bytes, "dry_run": dry_run}
    return [
        *here,
        lambda: carry_out(of_storage(storage, older_than), dry_run),
        lambda: carry_out(_packages(located, older_than), dry_run),
        lambda: carry_out(of_tracking(uri, storage), dry_run),
        lambda: _of_nodes(located, told),
    ]


def _of_nodes(located: profiles.Located, told: Mapping[str, Any]) -> Iterator[Row]:
    from jobs.doctor import run_job

    found = run_job(profiles.ask(located), "jobs.leftovers", told)
    yield from (Row(**row) for row in found["rows"])
    if found["silent"]:
        raise UserError(f"{len(found['silent'])} nodes did not look: {found['silent'][0]}")


# A host


def of_host(older_than: float, cache_bytes: float) -> list[Leftover]:
    """Folders of processes that have ended, Ray's sessions that have, and what the caches have no room for."""
    now = time.time()
    named, oldest = _living()
    temporary = Path(tempfile.gettempdir())
    ray_folder = Path(os.environ.get("RAY_TMPDIR", temporary)) / "ray"
    found: list[Leftover] = []
    for kind, folder in [
        *(("temporary folder", path) for path in sorted(temporary.glob("tessera-*"))),
        *(("Ray session", path) for path in sorted(ray_folder.glob("session_2*"))),
    ]:
        with suppress(FileNotFoundError, PermissionError):
            size, changed = _measure(folder)
            if is_abandoned(folder, changed, named, oldest, now - older_than):
                found.append(Leftover(kind, str(folder), size, now - changed, _remover(folder)))
    for path, size, used in beyond_budget(cache_bytes):
        found.append(Leftover("cached data", str(path), size, now - used, _unlinker(path)))
    return found


def is_abandoned(folder: Path, changed: float, named: str, oldest: float, cutoff: float) -> bool:
    """Say whether a folder of this user belongs to nobody.

    Args:
        folder: to judge.
        changed: when anything in it was last written, in seconds since 1970.
        named: command lines, environments and working folders of the living processes.
        oldest: start of the oldest living process of ours, which may hold it without naming it.
        cutoff: time before which it must have been written.
    """
    ours = folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    return ours and changed < min(cutoff, oldest) and folder.name not in named


def _living() -> tuple[str, float]:
    """What living processes name, as one text, and the start of the oldest one that runs this code; not this one."""
    words: list[str] = []
    oldest = time.time()
    for process in psutil.process_iter(["cmdline", "environ", "cwd", "create_time"]):
        info = process.info
        command: list[str] = info["cmdline"] or []
        words += [*command, *(info["environ"] or {}).values(), info["cwd"] or ""]
        if process.pid != os.getpid() and is_ours(command):
            oldest = min(oldest, info["create_time"])
    return "\0".join(words), oldest


def is_ours(command: Sequence[str]) -> bool:
    """Say whether a command line runs this code: `tessera …` or `python -m jobs.…`."""
    modules = (word for flag, word in zip(command, command[1:], strict=False) if flag == "-m")
    return any(Path(word).name == "tessera" for word in command[:2]) or any(m.startswith("jobs.") for m in modules)


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes of a folder, and when anything in it was last changed."""
    size, changed = 0, folder.lstat().st_mtime
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                stat = (Path(root) / name).lstat()
                size, changed = size + stat.st_size, max(changed, stat.st_mtime)
    return size, changed


def _remover(folder: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(folder)


def _unlinker(path: Path) -> Callable[[], None]:
    return lambda: path.unlink(missing_ok=True)


# The storage of runs


def of_storage(storage: str, older_than: float) -> list[Leftover]:
    """Torn checkpoints and half-written objects of runs that nobody carries on."""
    root, now = Store(storage, _SECONDS), time.time()
    entries = root.entries()
    leased = {name.partition("/lease/")[0] for name in entries if "/lease/" in name}
    owner, dead = partial(_owner, leased), cache(partial(_is_dead, root))
    torn = {folder: {name: entries[name] for name in names} for folder, names in torn_checkpoints(entries).items()}
    found = [
        *(_torn(root, run, folder, held, now) for folder, held in torn.items() if dead(run := owner(folder))),
        *(_half(root, run, each, now) for each in root.unfinished() if dead(run := owner(each.name))),
        *(
            Leftover("trial object", f"{root.uri}/{name}", size, now - written, _deleter(root, [name]))
            for name, (size, written) in entries.items()
            if name.startswith(f"{PLACE}/")
        ),
    ]
    return [each for each in found if each.age is not None and each.age > older_than]


def _owner(leased: Collection[str], name: str) -> str:
    """The run whose lease guards a name: the innermost folder that has one, a trial before its sweep."""
    folders = [str(folder) for folder in PurePosixPath(name).parents]
    return next((folder for folder in folders if folder in leased), name.split("/", 1)[0])


def _torn(root: Store, run: str, folder: str, held: Mapping[str, tuple[int, float]], now: float) -> Leftover:
    size, written = sum(size for size, _ in held.values()), max(written for _, written in held.values())

    def remove() -> None:
        _check_dead(root, run)
        _deleter(root, held)()

    return Leftover("torn checkpoint", f"{root.uri}/{folder}", size, now - written, remove)


def torn_checkpoints(names: Iterable[str]) -> dict[str, list[str]]:
    """Folders `RUN/checkpoints/step-…` that were never committed, with the names of their objects."""
    folders: dict[str, list[str]] = {}
    for name in names:
        run, _, rest = name.partition("/checkpoints/")
        step, _, file = rest.partition("/")
        if step.startswith("step-") and file:
            folders.setdefault(f"{run}/checkpoints/{step}", []).append(name)
    return {folder: found for folder, found in folders.items() if f"{folder}/{MARKER}" not in found}


def _half(root: Store, run: str, each: Unfinished, now: float) -> Leftover:
    def remove() -> None:
        _check_dead(root, run)
        root.abort(each)

    return Leftover("unfinished object", f"{root.uri}/{each.name}", each.size, now - each.since, remove)


def _is_dead(root: Store, run: str) -> bool:
    store = root.sub(run)
    return living_holder(store, newest_epoch(store)) is None


def _check_dead(root: Store, run: str) -> None:
    if not _is_dead(root, run):
        raise UserError(f"run {run} is alive again: left alone")


def _deleter(root: Store, names: Iterable[str]) -> Callable[[], None]:
    def remove() -> None:
        for name in names:
            root.delete(name)

    return remove


def of_packages(storage: str, older_than: float, named: Collection[str]) -> list[Leftover]:
    """Packages that no run was begun with; `named` are the hashes of those that Ray's jobs name."""
    from jobs.submit import PACKAGES
    from jobs.train import STATE

    root, now = Store(storage, _SECONDS), time.time()
    kept = {name: entry for name, entry in root.entries(PACKAGES).items() if now - entry[1] > older_than}
    states = [name for name in root.list() if name.endswith(f"/{STATE}")] if kept else []
    used = {*named, *(json.loads(root.get(name)).get("archive") for name in states)}
    return [
        Leftover("package", f"{root.uri}/{name}", size, now - written, _deleter(root, [name]))
        for name, (size, written) in kept.items()
        if Path(name).stem not in used
    ]


def _packages(located: profiles.Located, older_than: float) -> list[Leftover]:
    from jobs import submit

    profile = profiles.ask(located)
    with submit.job_client(profile) as client:
        named = {(job.metadata or {}).get("package", "") for job in submit.jobs_of(client)}
    return of_packages(profile.storage_uri, older_than, named)


# MLflow and Ray


def of_tracking(uri: str, storage: str) -> list[Leftover]:
    """Runs that MLflow takes for running although their driver died."""
    from jobs.train import outcome
    from service import tracking

    return [
        Leftover(f"MLflow run, {status.lower()}", name, 0, None, lambda id_=id_, s=status: tracking.finish(uri, id_, s))
        for id_, name, status in tracking.abandoned(uri, storage, outcome)
    ]


def collect(older_than: float, cache_bytes: float, dry_run: bool) -> dict[str, Any]:
    """Carry out the collection on every node of the Ray cluster that this process has joined."""
    import ray

    from jobs import nodes, supervise

    groups = (supervise.stale_placement_groups if dry_run else supervise.free_placement_groups)()
    state = "found" if dry_run else "removed"
    rows = [asdict(Row("placement group", group, "", 0, None, state)) for group in groups]
    there = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    answers, silent = nodes.on_nodes(there, on_this_host, older_than, cache_bytes, dry_run)
    return {"rows": [*rows, *(row for found in answers.values() for row in found)], "silent": list(silent.values())}


def on_this_host(older_than: float, cache_bytes: float, dry_run: bool) -> list[dict[str, Any]]:
    """Carry out the collection on this host; rows as plain JSON."""
    return [asdict(row) for row in carry_out(of_host(older_than, cache_bytes), dry_run, socket.gethostname())]


def main(arguments: Sequence[str]) -> int:
    """Collect on every node and print the answer, as a Ray job."""
    from jobs.nodes import answer, start_ray

    start_ray()
    answer(collect(**json.loads(arguments[0])))
    return 0


if __name__ == "__main__":
    from jobs import leftovers  # under the name that the nodes import it by

    sys.exit(leftovers.main(sys.argv[1:]))
