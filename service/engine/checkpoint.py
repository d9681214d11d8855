"""Full training state in the run's storage: written in the background, committed by a marker that is written last.

    checkpoints/step-00000120-lease-0001/<files of torch.distributed.checkpoint>
    checkpoints/step-00000120-lease-0001/COMMIT.json    step, environment, lease epoch, SHA-256 of every file

A folder without its marker is a torn write and is never read; drivers of different leases never share a folder. The
metadata of `torch.distributed.checkpoint` is a pickle: it is read from the run's own storage only, after its checksum
held. Under DDP all ranks hold the same state and no generator needs saving, so rank 0 writes for all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from service.collectives import from_rank_0, rank
from service.data.store import NotFound, Store

MARKER = "COMMIT.json"
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


@dataclass
class Checkpoints:
    """Checkpoints of one run.

    Args:
        store: the run's `checkpoints/`.
        environment: of this worker, recorded and compared.
        before_write: called before a checkpoint's files are stored and again before it commits; raises when this driver
            may no longer write.
        lease_epoch: recorded in the marker.
        keep_last: committed checkpoints that stay.
    """

    store: Store
    environment: dict[str, str | int]
    before_write: Callable[[], None]
    lease_epoch: int
    keep_last: int
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _pending: Future[None] | None = None

    def save(self, step: int, state: TrainingState) -> None:
        """Copy the state and write it in the background; waits for, and reports, the write before this one."""
        self.wait()
        self._pending = self._writer.submit(self._write, step, _copy(state.plain()))

    def wait(self) -> None:
        """Wait until the pending write is committed; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        self.before_write()
        folder = f"step-{step:08d}-lease-{self.lease_epoch:04d}"
        with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as local:
            with _one_process():
                dcp.save(state, storage_writer=dcp.FileSystemWriter(local, sync_files=False), no_dist=True)
            files = sorted(path for path in Path(local).rglob("*") if path.is_file())
            hashes = {path.relative_to(local).as_posix(): _sha256(path) for path in files}
            for path, name in zip(files, hashes, strict=True):
                self.store.put(f"{folder}/{name}", path)
        marker = {"step": step, "lease_epoch": self.lease_epoch, "environment": self.environment, "files": hashes}
        self.before_write()
        self.store.put(f"{folder}/{MARKER}", json.dumps(marker, indent=1).encode())
        for old in self.committed()[: -self.keep_last]:
            self._remove(old)

    def _remove(self, folder: str) -> None:
        self.store.delete(f"{folder}/{MARKER}")  # first, so that a torn removal is no checkpoint
        for name in self.store.list(folder):
            self.store.delete(name)

    def committed(self) -> list[str]:
        """Folders of the committed checkpoints, by step and lease, ascending."""
        return sorted(name.removesuffix(f"/{MARKER}") for name in self.store.list() if name.endswith(f"/{MARKER}"))

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return [int(folder.split("-")[1]) for folder in self.committed()]

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
        return int(folder.split("-")[1])

    def _restore_newest(self, state: TrainingState) -> str | None:
        for folder in reversed(self.committed()):
            try:
                self._load(folder, state)
                return folder
            except Damaged as error:
                log.warning("checkpoint %s is unusable (%s): removed, falling back to the one before", folder, error)
                self._remove(folder)  # or it would count among the newest, and push sound ones out
        return None

    def _load(self, folder: str, state: TrainingState) -> None:
        with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as local:
            marker = self._fetch(folder, Path(local))
            loaded = state.plain()
            with _one_process():
                dcp.load(loaded, storage_reader=dcp.FileSystemReader(local), no_dist=True)
            state.restore(loaded)
        self._compare(marker["environment"])

    def _fetch(self, folder: str, local: Path) -> dict[str, Any]:
        marker = json.loads(self.store.get(f"{folder}/{MARKER}"))
        for name, expected in marker["files"].items():
            path = local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.write_bytes(self.store.get(f"{folder}/{name}"))
            except NotFound as error:
                raise Damaged(str(error)) from error
            if _sha256(path) != expected:
                raise Damaged(f"{self.store.uri}/{folder}/{name} differs from its checksum in {MARKER}")
        return marker

    def _compare(self, then: dict[str, Any]) -> None:
        changed = {k: (v, self.environment.get(k)) for k, v in then.items() if v != self.environment.get(k)}
        if changed:
            what = ", ".join(f"{name} was {before}, is {now}" for name, (before, now) in changed.items())
            log.warning("resumed in another environment (%s): losses will be close, not bitwise equal", what)


@contextmanager
def _one_process() -> Generator[None]:
    """Silence the note that `no_dist=True` does what it says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


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
