"""Full training state in the run's storage: written in the background, committed by a marker that is written last.

    checkpoints/step-00000120/<files of torch.distributed.checkpoint>
    checkpoints/step-00000120/COMMIT.json    step, environment, lease epoch, SHA-256 of every file

A folder without its marker is a torn write and is never read. The metadata of `torch.distributed.checkpoint` is a
pickle: it is read from the run's own storage only, after its checksum held. Under DDP all ranks hold the same state
and no generator needs saving, so rank 0 writes for all.
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
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from datasets_prep.errors import UserError
from service.data.store import Store

MARKER = "COMMIT.json"
log = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What a checkpoint holds besides the step: module, optimiser, and averaged weights if any."""

    module: nn.Module
    optimizer: Optimizer
    averaged: nn.Module | None

    def plain(self) -> dict[str, Any]:
        """Nested dictionaries of the live tensors, with names that no wrapper changes."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        averaged = self.averaged.state_dict() if self.averaged is not None else {}
        return {"model": model, "optimizer": optimizer, "averaged": averaged}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `plain` returned and a checkpoint filled in."""
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])


@dataclass
class Checkpoints:
    """Checkpoints of one run.

    Args:
        store: the run's `checkpoints/`.
        environment: of this worker, recorded and compared.
        before_commit: called right before each commit; raises when this driver may no longer write.
        lease_epoch: recorded in the marker.
        keep_last: committed checkpoints that stay.
    """

    store: Store
    environment: dict[str, str | int]
    before_commit: Callable[[], None]
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
        folder = f"step-{step:08d}"
        with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as local:
            with _one_process():
                dcp.save(state, storage_writer=dcp.FileSystemWriter(local, sync_files=False), no_dist=True)
            files = sorted(path for path in Path(local).rglob("*") if path.is_file())
            hashes = {path.relative_to(local).as_posix(): _sha256(path) for path in files}
            for path, name in zip(files, hashes, strict=True):
                self.store.put(f"{folder}/{name}", path)
        marker = {"step": step, "lease_epoch": self.lease_epoch, "environment": self.environment, "files": hashes}
        self.before_commit()
        self.store.put(f"{folder}/{MARKER}", json.dumps(marker, indent=1).encode())
        for old in self.committed()[: -self.keep_last]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        folder = f"step-{step:08d}/"
        self.store.delete(folder + MARKER)  # first, so that a torn removal is no checkpoint
        for name in self.store.list(folder):
            self.store.delete(name)

    def committed(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        markers = [name for name in self.store.list() if name.endswith("/" + MARKER)]
        return sorted(int(name.split("/")[-2].removeprefix("step-")) for name in markers)

    def restore(self, state: TrainingState) -> int:
        """Load the newest sound checkpoint into `state`; returns its step, 0 when there is none."""
        for step in reversed(self.committed()):
            with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as local:
                try:
                    marker = self._fetch(step, Path(local))
                except UserError as error:
                    log.warning("checkpoint of step %d is unusable (%s): falling back to the one before", step, error)
                    continue
                loaded = state.plain()
                with _one_process():
                    dcp.load(loaded, storage_reader=dcp.FileSystemReader(local), no_dist=True)
                state.restore(loaded)
            self._compare(marker["environment"])
            return step
        return 0

    def _fetch(self, step: int, local: Path) -> dict[str, Any]:
        folder = f"step-{step:08d}"
        marker = json.loads(self.store.get(f"{folder}/{MARKER}"))
        for name, expected in marker["files"].items():
            path = local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.store.get(f"{folder}/{name}"))
            if _sha256(path) != expected:
                raise UserError(f"{self.store.uri}/{folder}/{name} differs from its checksum in {MARKER}")
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
