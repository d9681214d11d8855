"""What runs in a worker process, under Ray Train or torchrun alike: training, watched, and its end told apart."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets_prep.errors import UserError
from service import watchdog
from service.config import RunConfig
from service.data.store import Store
from service.engine.lease import LeaseLost, asked_to_stop

if TYPE_CHECKING:
    from service.engine.loop import Run

FLUSH_SECONDS = 30.0
CLOSE_SECONDS = 5.0  # of a worker that fails or stops: somebody waits for it
LOST_SECONDS = 0.5  # of one that lost another: the run waits for it to end
WATCH_SECONDS = 2.0  # between looks at the lease
_OF_LINE = ("epoch", "lr", "weight_decay", "momentum", "images_per_s")  # not among the losses of a progress line
# How gloo, NCCL and the rendezvous tell that another worker has gone.
_PEER = re.compile(
    r"closed by peer|reset by peer|connection (was )?(closed|reset|refused|aborted)"
    r"|connect\w* .*(failed|refused|timed out)|broken pipe|socket (error|timeout)|clients joined|wait timeout"
    r"|ncclRemoteError|ncclSystemError|NCCL communicator was aborted|timed out .*(waiting|after) ",
    re.IGNORECASE,
)
_asked = threading.Event()  # to stop, by a signal to this process or through the lease
_node_leaves: Callable[[], bool] = lambda: False  # noqa: E731


class PeerLost(RuntimeError):
    """Another worker went away in the middle of a collective; this one is sound."""


class Stopped(RuntimeError):
    """Training stopped because it was asked to; what it did until then is in a checkpoint."""


class GivenUp(RuntimeError):
    """Training cannot go on, and would not if it were started again; the message names the cure."""


class WorkersFailed(RuntimeError):
    """Training failed in the workers; `user` tells whether bad input was the cause."""

    def __init__(self, message: str, user: bool) -> None:
        super().__init__(message)
        self.user = user


@dataclass(frozen=True)
class Payload:
    """What a worker is told; plain values, so that Ray can carry it."""

    config: dict[str, Any]
    storage: str
    lease_epoch: int
    tracking_uri: str
    mlflow_run: str


def listen(node_leaves: Callable[[], bool] = lambda: False) -> None:
    """Let training end at its next step, with a checkpoint, on SIGTERM or when the node is about to leave."""
    global _node_leaves
    _node_leaves = node_leaves
    signal.signal(signal.SIGTERM, lambda signum, frame: _asked.set())


def stop_requested() -> bool:
    """Say whether training is to stop; asked at each step, it is the heartbeat too."""
    watchdog.beat()
    return _asked.is_set() or _node_leaves()


def run_worker(payload: dict[str, Any]) -> None:
    """Train in one worker process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    told = Payload(**payload)
    config = RunConfig.model_validate(told.config)
    if threading.current_thread() is threading.main_thread():  # else who owns the main thread has done so
        listen()
    with watchdog.watch(60 * config.parallel.hang_minutes), _told_apart():
        _train(config, told)


def _train(config: RunConfig, told: Payload) -> None:
    from service.engine.loop import Run, train
    from service.tracking import Tracker

    run = Run(Store(told.storage), told.lease_epoch)
    if int(os.environ.get("RANK", 0)) != 0:
        train(config, run, stop_requested=stop_requested)
        return
    tracker = Tracker(run.store, told.tracking_uri, told.mlflow_run)
    try:
        with _watching(run):
            rows = progress(tracker.log)
            train(config, run, rows, lambda: tracker.flush(FLUSH_SECONDS), stop_requested)
    except BaseException as error:
        tracker.close(
            LOST_SECONDS if is_peer_lost(error) else CLOSE_SECONDS
        )  # MLflow gets the rest from the next start
        raise
    tracker.close()


@contextmanager
def _told_apart() -> Generator[None]:
    """Raise what a supervisor can judge without importing what raised it."""
    from service.engine.loop import Interrupted, TrainingFailed

    try:
        yield
    except Interrupted as error:
        raise Stopped(str(error)) from None
    except TrainingFailed as error:
        raise GivenUp(str(error)) from error
    except (RuntimeError, OSError) as error:
        if is_peer_lost(error):
            raise PeerLost(str(error).strip().split("\n")[0][:300]) from error
        raise


def is_peer_lost(error: BaseException) -> bool:
    """Say whether a collective failed because another process has gone."""
    name = type(error).__name__  # of torch.distributed, which need not be imported to tell
    return name in ("DistNetworkError", "DistBackendError", "DistStoreError") or _PEER.search(str(error)) is not None


@contextmanager
def _watching(run: Run) -> Generator[None]:
    """Look every few seconds whether the run is to stop, be it asked to or taken over."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            with suppress(UserError):  # the store is away: asked again
                try:
                    run.fence()
                except LeaseLost:
                    _asked.set()
                if asked_to_stop(run.store, run.lease_epoch):
                    _asked.set()

    thread = threading.Thread(target=watch, daemon=True, name="lease watch")
    thread.start()
    try:
        yield
    finally:
        ended.set()


def progress(log: Callable[[int, dict[str, float]], None]) -> Callable[[int, dict[str, float]], None]:
    """Pass rows on, and print one as a line every few seconds."""
    printed = 0.0

    def take(step: int, row: dict[str, float]) -> None:
        nonlocal printed
        eta = row.pop("eta_s", None)
        log(step, row)
        if "val_linear" in row:
            print(
                f"step {step:>6}  validation probe {row['val_linear']:.2f} ± {row['val_linear_se']:.2f} %", flush=True
            )
        elif eta is not None and (time.monotonic() - printed > 2 or eta == 0):
            printed = time.monotonic()
            terms = "  ".join(f"{name} {row[name]:.4g}" for name in row if name not in _OF_LINE)
            print(
                f"step {step:>6}  epoch {row['epoch']:.1f}  {terms}  lr {row['lr']:.2g}  "
                f"{row['images_per_s']:.0f} images/s  ETA {eta // 60:.0f}:{eta % 60:02.0f}",
                flush=True,
            )

    return take
