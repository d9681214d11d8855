"""Where a run's time goes: a clock by phase, events in the run's storage, and what these add up to.

    events/000002-000000.jsonl                 of the second leg, that is life of rank 0: begin, restored, first, …, end
    events/000000-1763768000000000000.jsonl    of a driver: what it saw (`record`)

Every event of a leg carries the clock: the steps done so far, when the last of them was, the seconds of each phase. The
last line of a leg is `progress`, replaced every few seconds, so that little of a killed leg is unknown.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import numpy as np

from datasets_prep.errors import UserError
from service.data.store import Store

log = logging.getLogger(__name__)
Event = Mapping[str, Any]
T = TypeVar("T")

EVENTS = "events"
FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"  # outcomes; another is the name of what was raised
_FLUSH_SECONDS = 2.0
_CHUNK_LINES = 200  # an object is rewritten as it grows
_CLOSE_SECONDS = 10.0


class Clock:
    """Seconds by phase, and the steps done, for some 10 µs a step. Other threads may read it."""

    def __init__(self) -> None:
        self._phase, self._since = "start", time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self.began = time.time()
        self._step, self._stepped = 0, self.began
        self._lock = threading.Lock()

    def enter(self, phase: str) -> None:
        """Begin another phase."""
        with self._lock:
            now = time.perf_counter()
            self._seconds[self._phase] += now - self._since
            self._phase, self._since = phase, now

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Spend the block in a phase, then return to the one before."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def steps(self, batches: Iterable[T]) -> Generator[T]:
        """Yield batches: waiting for one is phase `data`, what is done with it phase `step`."""
        self.enter("data")
        for batch in batches:
            self.enter("step")
            yield batch
            self.enter("data")

    def done(self, step: int) -> None:
        """Take note that `step` steps of the run are done."""
        with self._lock:
            self._step, self._stepped = step, time.time()

    def reading(self) -> dict[str, Any]:
        """Steps done, when the last was, and seconds by phase, the present one's included."""
        with self._lock:
            seconds = dict(self._seconds)
            seconds[self._phase] = seconds.get(self._phase, 0.0) + time.perf_counter() - self._since
            return {"step": self._step, "stepped": self._stepped, "seconds": seconds}


class Leg:
    """Events of one life of a rank, stored by a thread: training never waits for storage.

    Args:
        store: the run's; None, as on ranks above 0, keeps nothing.
        clock: that every event carries.
        facts: of this life, such as host and world, that `begin` tells.
    """

    def __init__(self, store: Store | None, clock: Clock, **facts: Any) -> None:
        self.clock = clock
        self._store = store
        self._lines: list[str] = []
        self._number = self._chunk = 0
        self._changed = threading.Condition()
        self._hurry = self._closing = self._failing = self._stepping = False
        self._thread = threading.Thread(target=self._keep_storing, name="events to storage", daemon=True)
        self.tell("begin", time=clock.began, **facts)
        if store is not None:
            self._thread.start()

    def tell(self, event: str, **fields: Any) -> None:
        """Take an event; it is stored at once, in the background."""
        line = self._line(event, fields)
        with self._changed:
            self._lines.append(line)
            self._hurry = True
            self._changed.notify()

    def restored(self, step: int) -> None:
        """Take note of the step that the leg goes on from."""
        self.clock.done(step)
        self.tell("restored")

    def done(self, step: int) -> None:
        """Take note of a step of the run; the leg's first is an event."""
        self.clock.done(step)
        if not self._stepping:
            self._stepping = True
            self.tell("first")

    @contextmanager
    def saving(self, step: int) -> Generator[None]:
        """Spend the block, which keeps training waiting, in starting a checkpoint."""
        line, began = self.clock.reading(), time.time()
        with self.clock.phase("checkpoint"):
            yield
        self.tell("save", **line, time=began, checkpoint=step, stall=time.time() - began)

    def committed(self, step: int) -> None:
        """Take note that the checkpoint of a step is complete."""
        self.tell("commit", checkpoint=step)

    def close(self, outcome: str) -> None:
        """Store the last event, the outcome."""
        self.tell("end", outcome=outcome)
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._store is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _line(self, event: str, fields: Mapping[str, Any]) -> str:
        return json.dumps({"event": event, "time": time.time(), **self.clock.reading(), **fields})

    def _keep_storing(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._hurry or self._closing, _FLUSH_SECONDS)
                self._hurry, closing = False, self._closing
                lines = [*self._lines]
            try:
                self._write(lines, last=[] if closing else [self._line("progress", {})])
                self._failing = False
            except Exception as error:  # noqa: BLE001  (whatever it is, events wait and training goes on)
                if not self._failing:
                    log.warning("events wait for the run's storage: %s", error)
                self._failing = True

    def _write(self, lines: list[str], last: list[str]) -> None:
        assert self._store is not None
        if not self._number:
            self._number = _claim(self._store)
        name = f"{EVENTS}/{self._number:06d}-{self._chunk:06d}.jsonl"
        self._store.put(name, ("\n".join([*lines, *last]) + "\n").encode())
        if len(lines) >= _CHUNK_LINES:
            with self._changed:
                self._chunk, self._lines = self._chunk + 1, self._lines[len(lines) :]


def _claim(store: Store) -> int:
    """Number a new leg, even against a writer that starts at the same time."""
    number = 1 + max((_leg_of(name) for name in store.list(EVENTS)), default=0)
    while not store.create(f"{EVENTS}/{number:06d}-000000.jsonl", b""):
        number += 1
    return number


def _leg_of(name: str) -> int:
    return int(name.rsplit("/", 1)[-1].split("-")[0])


def record(store: Store, event: Event) -> None:
    """Keep what a driver saw, such as `{"event": "lost", "cause": "SIGKILL", …}`; a storage that is away is told.

    Args:
        store: the run's.
        event: its kind as `event`, and plain values; `time`, in seconds since 1970, is now unless given.
    """
    line = json.dumps({"time": time.time()} | dict(event))
    try:
        store.put(f"{EVENTS}/{0:06d}-{time.time_ns()}.jsonl", line.encode())
    except UserError as error:
        log.warning("the event %s is not kept: %s", line, error)


def read_events(store: Store) -> list[Event]:
    """All events of a run by time, each with its `leg`, 0 for a driver's."""
    events = [
        json.loads(line) | {"leg": _leg_of(name)}
        for name in store.list(EVENTS)
        for line in store.get(name).splitlines()
    ]
    return sorted(events, key=lambda event: event["time"])


@dataclass(frozen=True)
class Restart:
    """One interruption: from the last step before it to the first after it.

    `detect_seconds`, up to the driver's `lost`, is None where no driver told of one; `down_seconds` is the whole.
    """

    cause: str
    step: int
    lost_steps: int
    detect_seconds: float | None
    down_seconds: float


@dataclass(frozen=True)
class Goodput:
    """What became of a run's wall time.

    `goodput` is the effective training time: seconds of the steps that the run is made of over all seconds from the
    first leg's begin to the last event. `seconds` divides the latter into `step` (these), `lost` (of steps that were
    taken again), `data`, `evaluate`, `checkpoint` (training waiting for one), `start`, `restore` and `down` (no leg).
    """

    goodput: float
    wall_seconds: float
    seconds: dict[str, float]
    steps: int
    lost_steps: int
    restarts: list[Restart]
    stalls: list[float]
    write_seconds: list[float]
    save_every_seconds: float | None
    outcome: str

    def metrics(self) -> dict[str, float]:
        """Numbers for a metrics row."""
        return {"goodput": self.goodput, "lost_steps": self.lost_steps, "restarts": len(self.restarts)}

    def plain(self) -> dict[str, Any]:
        """All of it as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class _Life:
    """A leg as its events tell it."""

    events: list[Event]

    @property
    def began(self) -> float:
        return self.events[0]["time"]

    @property
    def start(self) -> int | None:
        """Step that it went on from; None where it ended before it knew."""
        return next((event["step"] for event in self.events if event["event"] == "restored"), None)

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def first_step(self) -> float:
        """When its first step was done, or its last sign where none was."""
        return next((event["stepped"] for event in self.events if event["event"] == "first"), self.last["time"])

    def step_seconds(self, step: int) -> float:
        """Seconds in steps when `step` steps of the run were done."""
        seconds: dict[int, float] = {}
        for event in self.events:
            seconds.setdefault(event["step"], event["seconds"].get("step", 0.0))
        return float(np.interp(step, sorted(seconds), [seconds[at] for at in sorted(seconds)]))


def goodput(events: Iterable[Event], alive: bool = True) -> Goodput:
    """Add up a run's events.

    Args:
        events: as `read_events` returns them.
        alive: whether the last leg, without an end, still trains; if not, its steps since the newest commit are lost.

    Raises:
        ValueError: no leg has begun.
    """
    events = sorted(events, key=lambda event: event["time"])
    numbers = sorted({event["leg"] for event in events} - {0})
    if not numbers:
        raise ValueError("no leg of the run has begun")
    legs = [_Life([event for event in events if event["leg"] == number]) for number in numbers]
    outcome = legs[-1].last.get("outcome", RUNNING if alive else STOPPED)
    kept = _kept(legs, outcome in (FINISHED, RUNNING) and legs[-1].start is not None)
    lost = [leg.last["step"] - max(leg.start or 0, end) for leg, end in zip(legs, kept, strict=True)]
    wall = max(leg.last["time"] for leg in legs) - min(leg.began for leg in legs)
    seconds = _seconds(legs, kept, wall)
    faults = [event for event in events if event["event"] == "lost"]
    return Goodput(
        goodput=seconds["step"] / wall if wall else 0.0,
        wall_seconds=wall,
        seconds=seconds,
        steps=max(kept),
        lost_steps=sum(lost),
        restarts=[_restart(*pair, steps, faults) for pair, steps in zip(pairwise(legs), lost, strict=False)],
        stalls=[event["stall"] for event in events if event["event"] == "save"],
        write_seconds=_write_seconds(events),
        save_every_seconds=_save_every(legs),
        outcome=outcome,
    )


def _kept(legs: Sequence[_Life], all_survive: bool) -> list[int]:
    """Last step of each leg that the run is made of: none that a later leg took again, or would have to."""
    commits = [event["checkpoint"] for leg in legs for event in leg.events if event["event"] == "commit"]
    ceiling = max((leg.last["step"] for leg in legs), default=0) if all_survive else max(commits, default=0)
    kept: list[int] = []
    for leg in reversed(legs):
        kept.insert(0, min(leg.last["step"], ceiling))
        ceiling = ceiling if leg.start is None else min(ceiling, leg.start)
    return kept


def _seconds(legs: Sequence[_Life], kept: Sequence[int], wall: float) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for leg, end in zip(legs, kept, strict=True):
        useful = leg.step_seconds(end)
        for phase, spent in leg.last["seconds"].items():
            seconds[phase] += useful if phase == "step" else spent
        seconds["lost"] += leg.last["seconds"].get("step", 0.0) - useful
    seconds["down"] = max(0.0, wall - sum(seconds.values()))
    return {"step": 0.0} | dict(seconds)


def _restart(before: _Life, after: _Life, lost_steps: int, faults: Sequence[Event]) -> Restart:
    ended = before.last["stepped"]
    seen = [fault for fault in faults if ended <= fault["time"] <= after.first_step]
    return Restart(
        cause=", ".join(str(fault.get("cause", "lost")) for fault in seen) or before.last.get("outcome", "unknown"),
        step=after.start,
        lost_steps=lost_steps,
        detect_seconds=seen[0]["time"] - ended if seen else None,
        down_seconds=max(0.0, after.first_step - ended),
    )


def _write_seconds(events: Sequence[Event]) -> list[float]:
    """Seconds from the start of each checkpoint to its commit."""
    began = {(e["leg"], e["checkpoint"]): e["time"] for e in events if e["event"] == "save"}
    commits = [(e["time"], (e["leg"], e["checkpoint"])) for e in events if e["event"] == "commit"]
    return [time - began[which] for time, which in commits if which in began]


def _save_every(legs: Sequence[_Life]) -> float | None:
    times = [[event["time"] for event in leg.events if event["event"] == "save"] for leg in legs]
    gaps = [after - before for own in times for before, after in pairwise(own)]
    return median(gaps) if gaps else None


@dataclass(frozen=True)
class Timeline:
    """What a picture shows, in seconds since the first leg began: steps done by each leg, checkpoints, faults."""

    legs: list[list[tuple[float, int]]]
    commits: list[tuple[float, int]]
    faults: list[float]


def timeline(events: Sequence[Event]) -> Timeline:
    """Lay a run's events out over time."""
    began = min(event["time"] for event in events)
    legs: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for event in events:
        if event["leg"] and event["event"] != "begin":
            legs[event["leg"]].append((event["time"] - began, event["step"]))
    commits = [(e["time"] - began, e["checkpoint"]) for e in events if e["event"] == "commit"]
    faults = [e["time"] - began for e in events if e["event"] == "lost"]
    return Timeline(list(legs.values()), commits, faults)


@dataclass(frozen=True)
class Model:
    """What a run's own stalls and restarts would mean elsewhere.

    Per failure are lost: detecting it, restarting, and half an interval of steps. `optimal_every_seconds` is
    √(2 · stall · MTBF) (Young 1974), but no less than writing a checkpoint takes.
    """

    every_seconds: float
    lost_per_failure: float
    goodput: float
    optimal_every_seconds: float
    optimal_goodput: float
    gpu_hours_lost_a_day: float


def model(found: Goodput, gpus: int, mtbf_hours: float) -> Model | None:
    """Expected goodput of a job of `gpus` with a failure every `mtbf_hours`; None where no interval was measured.

    A run that was never interrupted stands in with its own start.
    """
    if found.save_every_seconds is None:
        return None
    mtbf, stall = 3600 * mtbf_hours, median(found.stalls)
    downs = [restart.down_seconds for restart in found.restarts]
    down = median(downs) if downs else found.seconds.get("start", 0.0) + found.seconds.get("restore", 0.0)

    def share(every: float) -> float:
        return max(0.0, 1 - (down + every / 2) / mtbf) * every / (every + stall)

    used = found.save_every_seconds
    optimum = max(float(np.sqrt(2 * stall * mtbf)), median(found.write_seconds or [0.0]))
    lost = 24 * gpus * (1 - share(used))
    return Model(used, down + used / 2, share(used), optimum, share(optimum), lost)
