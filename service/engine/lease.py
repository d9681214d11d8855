"""Who may write to a run: one object a lease epoch, made by put-if-absent, so of two drivers one wins.

The holder of the highest epoch is the run's only writer. A driver that comes back from the dead finds a higher
epoch than its own and is refused. While a driver lives it renews a heartbeat beside its lease.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING

import psutil

from datasets_prep.errors import UserError

if TYPE_CHECKING:
    from service.data.store import Store

BEAT_SECONDS = 3.0
DEAD_AFTER_SECONDS = 60.0  # longer than a store's outage and the pauses of its retries after it
RECHECK_SECONDS = 8.0


class LeaseLost(RuntimeError):
    """Another driver has taken over the run; this one must stop without writing."""


class RunAlive(UserError):
    """Another driver holds the run and is alive."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(f"held by job {holder.job or '—'} (process {holder.pid} on {holder.host})")
        self.holder = holder


@dataclass(frozen=True)
class Holder:
    """Who took a lease: host, process and its start (so a reused pid is told apart), and the Ray job if any."""

    host: str
    pid: int
    started: float
    job: str | None

    @staticmethod
    def me(job: str | None = None) -> Holder:
        """Describe this process."""
        return Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), job)

    def known_dead(self) -> bool:
        """Tell whether the process ran on this host and is gone; on other hosts only the heartbeat tells."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) > 1 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _name(epoch: int) -> str:
    return f"lease/{epoch:06d}.json"


def newest_epoch(run: Store) -> int:
    """Highest lease epoch of a run, 0 when nobody ever held it."""
    names = [name for name in run.list("lease/") if name.endswith(".json")]
    return max((int(name.split("/")[-1].removesuffix(".json")) for name in names), default=0)


def living_holder(run: Store, epoch: int) -> Holder | None:
    """Holder of the lease `epoch` if it has neither released it, nor died, nor fallen silent."""
    if epoch == 0:
        return None
    holder = Holder(**json.loads(run.get(_name(epoch))))
    silent = time.time() - _last_beat(run, epoch) > DEAD_AFTER_SECONDS
    return None if silent or holder.known_dead() else holder


def _last_beat(run: Store, epoch: int) -> float:
    """When the holder last beat, in seconds since 1970; 0 when it has released the lease."""
    name = f"lease/{epoch:06d}.beat"
    return float(run.get(name)) if run.exists(name) else 0.0


def _revives(run: Store, epoch: int) -> bool:
    """Watch a holder on another host that has fallen silent: after an outage of the store all have been silent."""
    before = _last_beat(run, epoch)
    if before == 0.0 or Holder(**json.loads(run.get(_name(epoch)))).known_dead():
        return False
    time.sleep(RECHECK_SECONDS)
    return _last_beat(run, epoch) > before


def ask_to_stop(run: Store, epoch: int) -> None:
    """Ask the workers of the driver that holds the lease `epoch` to stop with a checkpoint."""
    run.put(f"lease/{epoch:06d}.stop", b"")


def asked_to_stop(run: Store, epoch: int) -> bool:
    """Say whether they were asked."""
    return run.exists(f"lease/{epoch:06d}.stop")


class Lease:
    """A held lease; use as a context manager. `epoch` goes to the workers, which check it before they commit."""

    def __init__(self, run: Store, job: str | None = None) -> None:
        """Take the next epoch; raises RunAlive when the present holder lives."""
        self.run = run
        newest = newest_epoch(run)  # asked once: who finds N dead may only take N + 1
        holder = living_holder(run, newest)
        if holder is None and newest > 0 and _revives(run, newest):
            holder = living_holder(run, newest)
        if holder is not None:
            raise RunAlive(holder)
        self.epoch = newest + 1
        self._beat()
        mine = json.dumps(asdict(Holder.me(job))).encode()
        if not run.create(_name(self.epoch), mine):
            taken = run.get(_name(self.epoch))
            if taken != mine:  # else a repeated request found the object that its first try had written
                raise RunAlive(Holder(**json.loads(taken)))
        self._stop = Event()
        self._thread = Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(UserError):  # the store is away: silence releases it
            self.run.put(f"lease/{self.epoch:06d}.beat", b"0")

    def _beat(self) -> None:
        self.run.put(f"lease/{self.epoch:06d}.beat", str(time.time()).encode())

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._beat()
            except UserError:  # the store is away: silence for long enough passes the lease on, as it should
                continue


def check_lease(run: Store, epoch: int) -> None:
    """Raise LeaseLost when a higher epoch than `epoch` exists."""
    newest = newest_epoch(run)
    if newest > epoch:
        raise LeaseLost(f"{run.uri} was taken over: lease epoch {newest} is newer than this driver's {epoch}")
