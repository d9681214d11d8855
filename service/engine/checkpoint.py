"""Full training state in the run's storage: written in the background, committed by a marker that is written last.

    checkpoints/step-00000120-lease-0001/1a2b3c4d__0_0.distcp    files of torch.distributed.checkpoint, one a rank
    checkpoints/step-00000120-lease-0001/1a2b3c4d.metadata
    checkpoints/step-00000120-lease-0001/COMMIT.json    what `_marker` puts there, with the SHA-256 of every file

A folder without its marker is a torn write and is never read; drivers of different leases never share a folder, and
two attempts at one checkpoint never a file. Metadata and plain values are pickles: they are read from the run's own
storage only, after their checksum held. Sharded state is written by all ranks, each its own shards; under DDP all ranks
hold the same, and rank 0 writes for all. Any number of ranks reads either, sharded or not.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, cast
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from datasets_prep.errors import UserError
from service import watchdog
from service.collectives import gather_objects, is_sharded, local, on_rank_0, own_group, rank
from service.config import RunConfig, changed_settings
from service.data.store import NotFound, Store, StoreUnavailable
from service.engine import MARKER

FORMAT = 2  # of markers; of another format nothing is read
_METADATA = ".metadata"  # as torch.distributed.checkpoint names it
_RETRY_SECONDS = 2.0  # between tries to write a checkpoint
_LATE_SECONDS = 5.0  # of a write, after which training no longer waits for it to begin the next
_AWAY = (StoreUnavailable, OSError)  # what storage that is away or full raises
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

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the state only."""
        return any(map(is_sharded, self.module.parameters()))

    def plain(self) -> dict[str, Any]:
        """Nested dictionaries of the live tensors, with names that no wrapper changes."""
        if not self.optimizer.state:  # else gradients would keep it from being filled in
            self.optimizer.zero_grad(set_to_none=True)
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


def listed(store: Store) -> tuple[list[str], list[str]]:
    """Folders below a run's `checkpoints/`, ascending by step and lease: committed ones, and torn ones.

    Torn are those that were never committed, or whose removal was cut short.
    """
    names = store.list()
    done = {name.removesuffix(f"/{MARKER}") for name in names if name.endswith(f"/{MARKER}")}
    return sorted(done), sorted({name.split("/")[0] for name in names if name.startswith("step-")} - done)


def committed(store: Store) -> list[str]:
    """Folders of the committed checkpoints below a run's `checkpoints/`, by step and lease, ascending."""
    return listed(store)[0]


def step_and_lease(folder: str) -> tuple[int, int]:
    """Step of a checkpoint and lease epoch of its writer, by the name of its folder."""
    _, step, _, lease = folder.split("-")
    return int(step), int(lease)


def read_marker(store: Store, folder: str) -> dict[str, Any]:
    """Read what a committed checkpoint says of itself; refuses one of another format, and raises `Damaged`."""
    try:
        marker = json.loads(store.get(f"{folder}/{MARKER}"))
    except ValueError as error:
        raise Damaged(f"{folder}/{MARKER} is no JSON") from error
    found = marker.get("format", 1)
    if found != FORMAT:
        raise UserError(
            f"{store.uri}/{folder} has format {found}, and this version reads {FORMAT}: "
            "finish the run with the version that began it, or start it again with --new"
        )
    return marker


def config_of(marker: dict[str, Any]) -> RunConfig:
    """Config of the run that wrote a checkpoint; refuses one that this version does not understand."""
    try:
        return RunConfig.model_validate(marker["config"])
    except ValidationError as error:
        raise UserError(
            f"the checkpoint of step {marker['step']} has a config that this version cannot read: {error}; "
            "use the version that began the run"
        ) from error


def check_changes(marker: dict[str, Any], config: RunConfig) -> bool:
    """Say whether a run's config differs from a checkpoint's in what is computed.

    Raises:
        UserError: where `checkpoint.allow_changes` does not name the setting.
    """
    changed, allowed = changed_settings(config_of(marker), config), config.checkpoint.allow_changes
    refused = {
        name: values
        for name, values in changed.items()
        if not any(f"{name}.".startswith(f"{each}.") for each in allowed)
    }
    if refused:
        what = ", ".join(f"{name} was {then!r}, is {now!r}" for name, (then, now) in refused.items())
        raise UserError(
            f"the checkpoint of step {marker['step']} is of another config: {what}; set them back, start another run, "
            f"or allow it: checkpoint.allow_changes=[{', '.join([*allowed, *refused])}]"
        )
    return bool(changed)


def faults(store: Store, folder: str) -> list[str]:
    """Read every file of a committed checkpoint, and say which are missing or differ from what was written."""
    found: list[str] = []
    try:
        files = read_marker(store, folder)["files"]
    except Damaged as error:
        return [str(error)]
    for name, expected in files.items():
        try:
            for _ in _checked(store, f"{folder}/{name}", expected):
                pass
        except Damaged as error:
            found.append(str(error))
    return found


def read(store: Store, folder: str, into: dict[str, Any], group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Fill nested state from a committed checkpoint, which may hold more; returns its marker.

    Collective in `group`; without one, a single process reads on its own.

    Raises:
        Damaged: a file that some rank reads is missing or has another checksum; all ranks raise it alike.
    """
    marker, metadata = on_rank_0(partial(_open, store, folder), group)
    _read(store, folder, marker, metadata, into, group)
    return marker


def _open(store: Store, folder: str) -> tuple[dict[str, Any], bytes]:
    """Marker and metadata of a checkpoint."""
    marker = read_marker(store, folder)
    name = _metadata_name(marker)
    return marker, b"".join(_checked(store, f"{folder}/{name}", marker["files"][name]))


def _metadata_name(marker: dict[str, Any]) -> str:
    return next(name for name in marker["files"] if name.endswith(_METADATA))


def _read(
    store: Store,
    folder: str,
    marker: dict[str, Any],
    metadata: bytes,
    into: dict[str, Any],
    group: dist.ProcessGroup | None,
) -> None:
    prefix = f"{folder}/{_metadata_name(marker).removesuffix(_METADATA)}"
    expected = {f"{folder}/{name}": described for name, described in marker["files"].items()}
    reader = dcp.FileSystemReader(".")
    reader.fs = _Files(store, prefix, expected, metadata)  # pyright: ignore[reportAttributeAccessIssue]
    with _unwrapped():
        dcp.load(into, storage_reader=reader, process_group=group, no_dist=group is None)


def _checked(store: Store, name: str, expected: dict[str, Any]) -> Iterator[bytes]:
    """Yield a file's bytes in order; raises `Damaged` at the end when they are not those that were written."""
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in store.stream(name):
            digest.update(chunk)
            size += len(chunk)
            yield chunk
    except NotFound as error:
        raise Damaged(f"{name} is missing") from error
    if digest.hexdigest() != expected["sha256"]:
        raise Damaged(f"{name} has {size:,} bytes that are not the {expected['bytes']:,} written")


class _Files(FileSystemBase):
    """Files of one checkpoint in a store, as `torch.distributed.checkpoint` wants them; each is whole or not there.

    Args:
        store: the run's `checkpoints/`.
        prefix: of the files' names.
        expected: size and checksum of the files that may be read, by name; the files written add theirs.
        metadata: what is read as metadata.
    """

    def __init__(
        self, store: Store, prefix: str, expected: dict[str, Any] | None = None, metadata: bytes = b""
    ) -> None:
        self.store, self.prefix, self.described, self._metadata = store, prefix, expected or {}, metadata

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase]:
        """Open a file to read once its checksum held, or to write; stored when it is closed without an error."""
        if mode == "rb" and str(path) == _METADATA:
            yield io.BytesIO(self._metadata)
            return
        name = f"{self.prefix}{path}".removesuffix(".tmp")
        with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as folder:
            local = Path(folder) / "file"
            if mode == "rb":
                with open(local, "wb") as file:
                    file.writelines(_checked(self.store, name, self.described[name]))
            with open(local, mode) as stream:
                yield cast(io.IOBase, stream)
            if mode == "wb":
                self.described[name] = {"sha256": _sha256(local), "bytes": local.stat().st_size}
                self.store.put(name, local)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """Name of a file; all lie in one folder."""
        return suffix

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        """Nothing: a store needs no folder."""
        return path

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Nothing: a store needs no folder."""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Nothing: what is stored has its last name already."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Nothing: no attempt shares a file with another."""
        return False

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Nothing: `Checkpoints` removes whole folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any name will do."""
        return True


class _Staging:
    """A copy of the state on the CPU, so that training may go on while it is written; its memory is used again."""

    def __init__(self) -> None:
        self._structure: Any = None
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, state: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Copy nested state, of sharded tensors the own shard; returns what waits for the copy and gives it.

        On a GPU the copy is queued before the next step's changes, and the training thread does not wait for it.
        """
        leaves, structure = pytree.tree_flatten(state)
        if structure != self._structure:
            self._structure = structure
            self._kept = {n: _buffer(leaf) for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        live = [leaves[n] for n in self._kept]
        torch._foreach_copy_(local(self._kept.values()), local(live), non_blocking=True)
        copied = torch.cuda.Event() if any(each.is_cuda for each in live) else None
        if copied is not None:
            copied.record()
        staged = pytree.tree_unflatten([self._kept.get(n, leaf) for n, leaf in enumerate(leaves)], structure)

        def ready() -> dict[str, Any]:
            if copied is not None:
                copied.synchronize()
            return staged

        return ready


def _buffer(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.pin_memory() if tensor.is_cuda and not is_sharded(tensor) else copy


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
        after_commit: called with the step of each checkpoint that is complete, in the background.
    """

    store: Store
    config: RunConfig
    environment: dict[str, str | int]
    before_write: Callable[[], None]
    lease_epoch: int
    after_commit: Callable[[int], None] = lambda step: None
    score: float | None = None  # of the last validation probe, in percent; `restore` takes it over
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _group: dist.ProcessGroup | None = field(default_factory=own_group)
    _staging: _Staging = field(default_factory=_Staging)
    _pending: Future[None] | None = None
    _superseded: Event = field(default_factory=Event)
    _failing_since: float | None = None
    _begun: float = 0.0

    def save(self, step: int, state: TrainingState) -> None:
        """Copy the state and write it in the background; waits for the write before this one. All ranks call it.

        While storage is away or full a write is tried again until the next save supersedes it. Raises what any other
        failure raised, and storage's own once it has failed for `checkpoint.patience_minutes`; where each rank writes
        its shards, all ranks alike.
        """
        self._superseded.set()
        self.wait()
        self._superseded.clear()
        if state.sharded or rank() == 0:
            group = self._group if state.sharded else None
            staged = self._staging(state.plain())
            self._begun = time.monotonic()
            self._pending = self._writer.submit(self._try, step, staged, self._marker(step), group)

    def late(self) -> bool:
        """Say whether this rank's pending write takes long, as it does when storage does not answer."""
        if self._pending is None or self._pending.done():
            return False
        return time.monotonic() - self._begun >= _LATE_SECONDS

    def wait(self) -> None:
        """Wait until this rank's pending write is committed; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def settle(self) -> None:
        """Wait until the pending write of every rank is committed. All ranks call it."""
        self.wait()
        gather_objects(None, self._group)

    def end(self) -> None:
        """Try no write again, so that a process that fails ends at once."""
        self._superseded.set()

    def _try(
        self,
        step: int,
        staged: Callable[[], dict[str, Any]],
        marker: dict[str, Any],
        group: dist.ProcessGroup | None,
    ) -> None:
        told = False
        while True:
            try:
                self._write(step, staged(), marker, group)
            except _AWAY as error:
                now = time.monotonic()
                self._failing_since = self._failing_since or now
                expired = now - self._failing_since >= 60 * self.config.checkpoint.patience_minutes
                if not told and rank() == 0:
                    log.warning("the checkpoint of step %d is not written yet: %s", step, error)
                told = True
                watchdog.beat()  # training may be over, and wait for this alone
                ended = gather_objects((expired, expired or self._superseded.wait(_RETRY_SECONDS)), group)
                if any(expired for expired, _ in ended):
                    raise
                if any(superseded for _, superseded in ended):
                    return
            else:
                self._failing_since = None
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

    def _write(self, step: int, state: dict[str, Any], marker: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        folder = f"step-{step:08d}-lease-{self.lease_epoch:04d}"
        attempt = on_rank_0(self._begin, group)
        try:
            written = self._write_files(f"{folder}/{attempt}", state, group)
            on_rank_0(partial(self._commit, folder, marker, written), group)
        except _AWAY:
            if rank() == 0:
                with suppress(UserError):  # or a torn folder would keep the place that the next one needs
                    self._remove(folder)
            raise
        on_rank_0(partial(self._conclude, step), group)

    def _conclude(self, step: int) -> None:
        self.after_commit(step)
        with suppress(*_AWAY):  # it is committed; the next one removes what need not stay
            self._prune(step)

    def _begin(self) -> str:
        self.before_write()
        return uuid4().hex[:8]

    def _write_files(self, prefix: str, state: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Store this rank's files; returns size and checksum of all ranks'."""
        files = _Files(self.store, prefix)
        writer = dcp.FileSystemWriter(".", sync_files=False)
        writer.fs = files  # pyright: ignore[reportAttributeAccessIssue]
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # of what all ranks hold, rank 0's counts
        with _unwrapped():
            dcp.save(state, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
        return {name: described for each in gather_objects(files.described, group) for name, described in each.items()}

    def _commit(self, folder: str, marker: dict[str, Any], written: dict[str, Any]) -> None:
        self.before_write()
        described = {name.removeprefix(f"{folder}/"): written[name] for name in sorted(written)}
        self.store.put(f"{folder}/{MARKER}", json.dumps(marker | {"files": described}, indent=1).encode())

    def _prune(self, step: int) -> None:
        """Remove checkpoints that need not stay, and what killed writers left; the newest always stays."""
        (folders, torn), keep = listed(self.store), self.config.checkpoint
        staying = {*folders[-keep.keep_last :]}
        if keep.keep_best:
            scores = {folder: self._score(folder) for folder in folders}
            rated = [folder for folder in folders if scores[folder] is not None]
            staying |= {*sorted(rated, key=lambda folder: scores[folder])[-keep.keep_best :]}
        for old in [*(folder for folder in folders if folder not in staying), *self._orphans(torn, step)]:
            self._remove(old)

    def _score(self, folder: str) -> float | None:
        try:
            return read_marker(self.store, folder)["val_linear"]
        except Damaged:
            return None

    def _orphans(self, torn: list[str], step: int) -> list[str]:
        """Torn folders that nobody writes to any more: of older leases, and of this one below `step`."""
        return [folder for folder in torn if step_and_lease(folder)[::-1] < (self.lease_epoch, step)]

    def _remove(self, folder: str) -> None:
        self.store.delete(f"{folder}/{MARKER}")  # first, so that a torn removal is no checkpoint
        for name in self.store.list(folder):
            self.store.delete(name)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return [step_and_lease(folder)[0] for folder in committed(self.store)]

    def newest_step(self) -> int:
        """Step of the newest committed checkpoint, 0 when there is none."""
        return max(self.steps(), default=0)

    def restore(self, state: TrainingState) -> int:
        """Load the newest sound checkpoint into `state`, the same on all ranks; returns its step, 0 if there is none.

        All ranks call it, whatever number of them wrote it. What older drivers left torn is removed.

        Raises:
            UserError: the checkpoint is of another format, or of a config that differs otherwise than
                `checkpoint.allow_changes` admits.
        """
        for folder in on_rank_0(self._open_newest, self._group):
            try:
                self._load(folder, state)
                return step_and_lease(folder)[0]
            except Damaged as error:
                if rank() == 0:
                    log.warning(
                        "checkpoint %s is unusable (%s): removed, falling back to the one before", folder, error
                    )
                # or it would count among the newest, and push sound ones out
                on_rank_0(partial(self._remove, folder), self._group)
        return 0

    def _open_newest(self) -> Sequence[str]:
        """Committed checkpoints, newest first, after the leavings of older leases are gone."""
        folders, torn = listed(self.store)
        for folder in self._orphans(torn, 0):
            self._remove(folder)
        if self.lease_epoch > 1:
            self.store.sweep()
        return folders[::-1]

    def _load(self, folder: str, state: TrainingState) -> None:
        marker, metadata = on_rank_0(partial(_open, self.store, folder), self._group)
        changed = check_changes(marker, self.config)
        loaded = state.plain()
        try:
            _read(self.store, folder, marker, metadata, loaded, self._group)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, Damaged) or not changed:
                raise
            raise UserError(
                f"checkpoint {folder} does not fit the changed config ({error}): start another run"
            ) from error
        state.restore(loaded)
        self.score = marker["val_linear"]
        self._compare(marker["environment"])

    def _compare(self, then: dict[str, Any]) -> None:
        changed = {k: (v, self.environment.get(k)) for k, v in then.items() if v != self.environment.get(k)}
        if changed:
            what = ", ".join(f"{name} was {before}, is {now}" for name, (before, now) in changed.items())
            log.warning("resumed in another environment (%s): losses will be close, not bitwise equal", what)


@contextmanager
def _unwrapped() -> Generator[None]:
    """Raise what failed in some rank instead of its wrapper, alike on all ranks; what no retry can mend comes first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist=True does what it says
        try:
            yield
        except CheckpointException as error:
            failures = [failure for failure, _ in error.failures.values()]
            raise next((each for each in failures if not isinstance(each, _AWAY)), failures[0]) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
