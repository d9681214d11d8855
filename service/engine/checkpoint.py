"""Full training state in the run's storage: written in the background, committed by a marker that is written last.

    checkpoints/step-00000120-lease-0001/<files of torch.distributed.checkpoint>
    checkpoints/step-00000120-lease-0001/COMMIT.json    what `_marker` puts there, with the SHA-256 of every file

A folder without its marker is a torn write and is never read; drivers of different leases never share a folder. The
metadata of `torch.distributed.checkpoint` is a pickle: it is read from the run's own storage only, after its checksum
held. Under DDP all ranks hold the same state and no generator needs saving, so rank 0 writes for all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from datasets_prep.errors import UserError
from service.collectives import from_rank_0, rank
from service.config import RunConfig
from service.data.store import NotFound, Store, StoreUnavailable

MARKER = "COMMIT.json"
FORMAT = 2  # of markers; of another format nothing is read
_RETRY_SECONDS = 2.0  # between tries to write a checkpoint
log = logging.getLogger(__name__)


class Damaged(RuntimeError):
    """A committed checkpoint lacks a file or has another than its marker says."""


@dataclass
class TrainingState:
    """What a checkpoint holds besides the step: module, optimiser, averaged weights if any, loss scale of fp16."""

    module: nn.Module
    optimizer: Optimizer
    averaged: nn.Module | None
    scaler: GradScaler

    def plain(self) -> dict[str, Any]:
        """Nested dictionaries of the live tensors, with names that no wrapper changes."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        averaged = self.averaged.state_dict() if self.averaged is not None else {}
        return {"model": model, "optimizer": optimizer, "averaged": averaged, "scaler": self.scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `plain` returned and a checkpoint filled in."""
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.scaler.load_state_dict(state["scaler"])


def committed(store: Store) -> list[str]:
    """Folders of the committed checkpoints below a run's `checkpoints/`, by step and lease, ascending."""
    return sorted(name.removesuffix(f"/{MARKER}") for name in store.list() if name.endswith(f"/{MARKER}"))


def torn(store: Store) -> list[str]:
    """Folders of checkpoints that were never committed, or whose removal was cut short."""
    folders = {name.split("/")[0] for name in store.list() if name.startswith("step-")}
    return sorted(folders - set(committed(store)))


def read_marker(store: Store, folder: str) -> dict[str, Any]:
    """Read what a committed checkpoint says of itself; refuses one of another format."""
    marker = json.loads(store.get(f"{folder}/{MARKER}"))
    found = marker.get("format", 1)
    if found != FORMAT:
        raise UserError(
            f"{store.uri}/{folder} has format {found}, and this version reads {FORMAT}: "
            "finish the run with the version that began it, or start it again with --new"
        )
    return marker


def fetch(store: Store, folder: str, local: Path) -> dict[str, Any]:
    """Copy a checkpoint's files into a local folder, each checked against the marker, which is returned.

    Raises:
        Damaged: a file is missing or has another checksum.
    """
    marker = read_marker(store, folder)
    for name, expected in marker["files"].items():
        path = local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                file.writelines(store.stream(f"{folder}/{name}"))
        except NotFound as error:
            raise Damaged(str(error)) from error
        if _sha256(path) != expected["sha256"]:
            raise Damaged(f"{store.uri}/{folder}/{name} differs from its checksum in {MARKER}")
    return marker


def faults(store: Store, folder: str) -> list[str]:
    """Read every file of a committed checkpoint, and say which are missing or differ from what was written."""
    found: list[str] = []
    for name, expected in read_marker(store, folder)["files"].items():
        digest, size = hashlib.sha256(), 0
        try:
            for chunk in store.stream(f"{folder}/{name}"):
                digest.update(chunk)
                size += len(chunk)
        except NotFound:
            found.append(f"{folder}/{name} is missing")
            continue
        if digest.hexdigest() != expected["sha256"]:
            found.append(f"{folder}/{name} has {size:,} bytes that are not the {expected['bytes']:,} written")
    return found


def read(local: Path, into: dict[str, Any]) -> None:
    """Fill nested state from a fetched checkpoint, which may hold more."""
    with _one_process():
        dcp.load(into, storage_reader=dcp.FileSystemReader(local), no_dist=True)


def _step_and_lease(folder: str) -> tuple[int, int]:
    _, step, _, lease = folder.split("-")
    return int(step), int(lease)


@dataclass
class Checkpoints:
    """Checkpoints of one run.

    Args:
        store: the run's `checkpoints/`.
        config: of the run, recorded; its `checkpoint` says what stays and how long storage may be away.
        environment: of this worker, recorded and compared.
        before_write: called before a checkpoint's files are stored and again before it commits; raises when this driver
            may no longer write.
        lease_epoch: recorded in the marker.
    """

    store: Store
    config: RunConfig
    environment: dict[str, str | int]
    before_write: Callable[[], None]
    lease_epoch: int
    score: float | None = None  # of the last validation probe, in percent; `restore` takes it over
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _pending: Future[None] | None = None
    _superseded: Event = field(default_factory=Event)
    _failing_since: float | None = None

    def save(self, step: int, state: TrainingState) -> None:
        """Copy the state and write it in the background; waits for the write before this one.

        While storage is away or full a write is tried again until the next save supersedes it. Raises what any other
        failure raised, and storage's own once it has failed for `checkpoint.patience_minutes`.
        """
        self._superseded.set()
        self.wait()
        self._superseded.clear()
        self._pending = self._writer.submit(self._try, step, _copy(state.plain()), self._marker(step))

    def wait(self) -> None:
        """Wait until the pending write is committed; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def end(self) -> None:
        """Try no write again, so that a process that fails ends at once."""
        self._superseded.set()

    def _try(self, step: int, state: dict[str, Any], marker: dict[str, Any]) -> None:
        told = False
        while True:
            try:
                self._write(step, state, marker)
            except (StoreUnavailable, OSError) as error:
                now = time.monotonic()
                self._failing_since = self._failing_since or now
                if now - self._failing_since >= 60 * self.config.checkpoint.patience_minutes:
                    raise
                if not told:
                    log.warning("the checkpoint of step %d is not written yet: %s", step, error)
                told = True
            else:
                self._failing_since = None
                return
            if self._superseded.wait(_RETRY_SECONDS):
                return

    def _marker(self, step: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": step,
            "lease_epoch": self.lease_epoch,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "val_linear": self.score,
            "environment": self.environment,
            "config": self.config.plain(),
        }

    def _write(self, step: int, state: dict[str, Any], marker: dict[str, Any]) -> None:
        self.before_write()
        folder = f"step-{step:08d}-lease-{self.lease_epoch:04d}"
        try:
            self._write_files(folder, state, marker)
        except (StoreUnavailable, OSError):
            with suppress(UserError):  # or a torn folder would keep the place that the next one needs
                self._remove(folder)
            raise
        self._prune(step)

    def _write_files(self, folder: str, state: dict[str, Any], marker: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as local:
            with _one_process():
                dcp.save(state, storage_writer=dcp.FileSystemWriter(local, sync_files=False), no_dist=True)
            files = {p.relative_to(local).as_posix(): p for p in sorted(Path(local).rglob("*")) if p.is_file()}
            described = {name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for name, p in files.items()}
            for name, path in files.items():
                self.store.put(f"{folder}/{name}", path)
        self.before_write()
        self.store.put(f"{folder}/{MARKER}", json.dumps(marker | {"files": described}, indent=1).encode())

    def _prune(self, step: int) -> None:
        """Remove checkpoints that need not stay, and what killed writers left; the newest always stays."""
        folders, keep = committed(self.store), self.config.checkpoint
        staying = {*folders[-keep.keep_last :]}
        if keep.keep_best:
            scores = {folder: read_marker(self.store, folder)["val_linear"] for folder in folders}
            rated = [folder for folder in folders if scores[folder] is not None]
            staying |= {*sorted(rated, key=lambda folder: scores[folder])[-keep.keep_best :]}
        # Of an older lease nothing is written any more, and of this one nothing below this step.
        orphans = [f for f in torn(self.store) if _step_and_lease(f)[::-1] < (self.lease_epoch, step)]
        for old in [*(folder for folder in folders if folder not in staying), *orphans]:
            self._remove(old)

    def _remove(self, folder: str) -> None:
        self.store.delete(f"{folder}/{MARKER}")  # first, so that a torn removal is no checkpoint
        for name in self.store.list(folder):
            self.store.delete(name)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return [_step_and_lease(folder)[0] for folder in committed(self.store)]

    def newest_step(self) -> int:
        """Step of the newest committed checkpoint, 0 when there is none."""
        return max(self.steps(), default=0)

    def restore(self, state: TrainingState) -> int:
        """Load the newest sound checkpoint into `state`, one for all ranks; returns its step, 0 if there is none."""
        folder = from_rank_0(self._restore_newest(state) if rank() == 0 else None)
        if folder is None:
            return 0
        if rank() != 0:
            self._load(folder, state)
        return _step_and_lease(folder)[0]

    def _restore_newest(self, state: TrainingState) -> str | None:
        for folder in reversed(committed(self.store)):
            try:
                self._load(folder, state)
                return folder
            except Damaged as error:
                log.warning("checkpoint %s is unusable (%s): removed, falling back to the one before", folder, error)
                self._remove(folder)  # or it would count among the newest, and push sound ones out
        return None

    def _load(self, folder: str, state: TrainingState) -> None:
        with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as local:
            marker = fetch(self.store, folder, Path(local))
            loaded = state.plain()
            read(Path(local), loaded)
            state.restore(loaded)
        self.score = marker["val_linear"]
        self._compare(marker["environment"])

    def _compare(self, then: dict[str, Any]) -> None:
        changed = {k: (v, self.environment.get(k)) for k, v in then.items() if v != self.environment.get(k)}
        if changed:
            what = ", ".join(f"{name} was {before}, is {now}" for name, (before, now) in changed.items())
            log.warning("resumed in another environment (%s): losses will be close, not bitwise equal", what)


@contextmanager
def _one_process() -> Generator[None]:
    """Silence the note that `no_dist=True` does what it says, and raise what failed instead of its wrapper."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def _copy(value: Any) -> Any:
    """Copy nested state to the CPU, so that training may go on while it is written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
