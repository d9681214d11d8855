"""A node's cache of shards: whole objects as files that its processes share.

A data set in a folder is mapped where it lies; all else is fetched once a node. A file appears by rename under the
name of its checksum, and every process checks it when it first maps it. Each shard has a lock, so that several
processes fetch different shards at once and the same one only once; the folder's lock guards the accounting.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from service.data.split import checked, mismatch
from service.data.store import Store

log = logging.getLogger(__name__)
_ACCOUNTS = "accounts"


def cache_root() -> Path:
    """Folder of this node's caches: `TESSERA_CACHE`, else the user's cache folder."""
    base = os.environ.get("TESSERA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tessera"
    return Path(base)


def beyond_budget(budget_bytes: float) -> list[tuple[Path, int, float]]:
    """Path, bytes and time of last use of the files of this node's caches that a budget has no room for.

    The least recently used ones come first; a process that has mapped a file keeps it when it is removed.
    """
    files: list[tuple[float, int, Path]] = []
    for path in (*cache_root().glob("shards/*"), *cache_root().glob("resident/*.npy")):
        with suppress(FileNotFoundError):
            if path.suffix not in (".lock", ".tmp") and path.name != _ACCOUNTS and not path.name.endswith(".bad.npy"):
                files.append((path.stat().st_atime, path.stat().st_size, path))
    excess = sum(size for _, size, _ in files) - budget_bytes
    found: list[tuple[Path, int, float]] = []
    for used, size, path in sorted(files):
        if excess > 0:
            found.append((path, size, used))
            excess -= size
    return found


class ShardCache:
    """Objects of data sets as files of a folder, least recently used ones removed beyond a byte budget.

    A folder that cannot be written to, or a full disk, costs memory instead: what cannot be kept is held by the reader.

    Args:
        budget_bytes: of all files together, whichever process wrote them.
        folder: of the files; none takes `shards` below `cache_root()`.
    """

    def __init__(self, budget_bytes: float, folder: Path | None = None) -> None:
        self.budget = budget_bytes
        self.folder = folder or cache_root() / "shards"
        self._verified: set[tuple[int, int, int, int]] = set()
        self._complained = False
        with suppress(OSError):  # the first fetch says what is wrong
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_orphans()

    def fetch(self, store: Store, name: str, sha256: str) -> memoryview:
        """Return an object's bytes, mapped from a file where possible.

        Raises:
            UserError: missing or unreachable object, or one whose checksum differs from `sha256`; with its address.
        """
        if store.local_path is not None:
            return self._in_place(store, name, sha256)
        path = self.folder / sha256
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locked(sha256[:2], store.deadline))
                if (found := self._map(path, sha256)) is not None:
                    return found
            except OSError as error:
                self._complain(error)
            data = checked(store, name, sha256)
            try:
                self._keep(path, data)
                return self._map(path, sha256) or memoryview(data)
            except OSError as error:
                self._complain(error)
                return memoryview(data)

    def _in_place(self, store: Store, name: str, sha256: str) -> memoryview:
        path = (store.local_path or Path()) / name
        try:
            found = self._map(path, sha256)
        except OSError:
            return memoryview(checked(store, name, sha256))  # or the store's error
        if found is None:
            raise mismatch(store, name, path.stat().st_size)
        return found

    def _map(self, path: Path, sha256: str) -> memoryview | None:
        """Map a file; None when it is absent from the cache, or its bytes are wrong, and then it is removed there."""
        ours = path.parent == self.folder
        try:
            with open(path, "rb") as file:
                identity = _identity(file)
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if identity[2] else b"")
                if ours:  # the time of last use; that of the last change stays
                    os.utime(file.fileno(), ns=(time.time_ns(), identity[3]))
        except FileNotFoundError:
            if ours:
                return None
            raise
        if identity not in self._verified:
            if hashlib.sha256(mapped).hexdigest() != sha256:
                if ours:
                    path.unlink(missing_ok=True)
                return None
            self._verified.add(identity)
        return mapped

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a file; when the disk is full, once more after making do with the bytes used by now."""
        try:
            self._write(path, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.budget = min(self.budget, self._used())
            self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        unfinished = path.with_suffix(".tmp")  # the shard's lock is ours
        with ExitStack() as stack:
            with self._locked(_ACCOUNTS):
                if not self._make_room(len(data)):
                    return  # others are writing that much: this object stays in memory
                file: IO[bytes] = stack.enter_context(open(unfinished, "wb"))
                os.truncate(file.fileno(), len(data))  # so that others count it from now on
            try:
                file.write(data)
                file.flush()
                self._verified.add(_identity(file))
                with self._locked(_ACCOUNTS):  # one who lists the files sees it under either name
                    unfinished.rename(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, bytes and path of each file, the least recently used one first."""
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix != ".lock":
                    found.append((path.stat().st_atime, path.stat().st_size, path))
        return sorted(found)

    def _used(self) -> int:
        return sum(size for _, size, path in self._files() if path.suffix != ".tmp")

    def _make_room(self, wanted: int) -> bool:
        if wanted > self.budget:
            raise OSError(errno.ENOSPC, f"an object of {wanted} bytes exceeds the cache's budget of {self.budget:.0f}")
        files = self._files()
        if wanted + sum(size for _, size, path in files if path.suffix == ".tmp") > self.budget:
            return False
        excess = sum(size for _, size, _ in files) + wanted - self.budget
        for _, size, path in files:
            if excess > 0 and path.suffix != ".tmp":
                path.unlink(missing_ok=True)  # a mapping of it stays valid
                excess -= size
        return True

    def _remove_orphans(self) -> None:
        """Remove what killed processes were writing: an unfinished file whose lock is free."""
        for path in self.folder.glob("*.tmp"):
            with suppress(TimeoutError), self._locked(path.name[:2], 0):
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str, seconds: float = 60.0) -> Generator[None]:
        """Hold a lock of the folder; TimeoutError when another process keeps it that long, as a stopped one does."""
        end = time.monotonic() + seconds
        with open(self.folder / f"{name}.lock", "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise TimeoutError(f"{file.name} was held for {seconds:g} s") from None
                    time.sleep(0.005)
            yield

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            log.warning("the shard cache %s does not work (%s): shards are held in memory", self.folder, error)
        self._complained = True


def _identity(file: IO[bytes]) -> tuple[int, int, int, int]:
    """What changes when a file is replaced or written to: device, inode, bytes, time of the last change."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
