"""What Ray Train does for a run, and what it is told to do when workers fail.

Ray places, watches and restarts workers. Which failure is worth a restart, how many workers are enough and what they
are told is decided here; workers resume from the newest checkpoint in the run's own storage.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, cast

import ray
import ray.train
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRun
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from datasets_prep.errors import UserError
from jobs.plan import check_resources
from jobs.worker import GivenUp, Payload, PeerLost, Stopped, WorkersFailed, listen, run_worker
from service.config import RunConfig, canonical_partitions
from service.data.store import Store, StoreUnavailable
from service.engine import MARKER
from service.engine.goodput import record
from service.engine.lease import LeaseLost, ask_to_stop, asked_to_stop

Cause = Literal["stop", "free", "lost", "crash", "start"]

GRACE_SECONDS = 25  # for the last checkpoint of a stopped run; `tessera jobs stop` kills after 30
_LOOK_SECONDS = 5.0  # between looks for room to grow
_SETTLE_SECONDS = 10.0  # until what a lost group held is free again, and a dead node is known to be dead
_LONGEST_PAUSE = 60.0
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker shows twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # of a process that is stopped or swapped out
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
_CAUSES: tuple[tuple[type[BaseException], Cause], ...] = (  # the first that fits
    (StoreUnavailable, "lost"),
    (UserError, "stop"),
    (GivenUp, "stop"),
    (LeaseLost, "stop"),
    (Stopped, "free"),
    (PreemptionError, "free"),
    (PeerLost, "lost"),
    (WorkerHealthCheckFailedError, "lost"),
    (WorkerHealthCheckTimeoutError, "lost"),
    (RayActorError, "lost"),
    (WorkerGroupStartupFailedError, "start"),
    (WorkerGroupStartupTimeoutError, "start"),
)
_SAID: Mapping[Cause, str] = {
    "lost": "workers lost",
    "crash": "a worker failed",
    "free": "workers stopped",
    "start": "workers not started",
}
_WEIGHT: tuple[Cause, ...] = ("stop", "crash", "free", "lost", "start")  # of several workers' causes the first counts


class MissingWorkers(UserError):
    """The cluster did not have room for the run's workers in time."""


def fit(config: RunConfig, payload: Payload) -> None:
    """Train on Ray's workers; returns when all have ended well.

    Raises:
        WorkersFailed: and starting again would not help, or has been tried often enough.
        SystemExit: the run was asked to stop, and has a checkpoint of the step at which it did.
    """
    _start_ray()
    there = ray.cluster_resources()
    gpu = check_resources(config, there.get("CPU", 0), there.get("GPU", 0))
    resources = {"CPU": config.parallel.cpus_per_worker} | ({"GPU": 1.0} if gpu else {})
    run = Store(payload.storage, deadline=5.0)
    with tempfile.TemporaryDirectory(prefix="tessera-ray-") as scratch:  # Ray wants a place; nothing of ours goes there
        scaling = ScalingConfig(num_workers=config.parallel.workers, use_gpu=gpu, resources_per_worker=resources)
        trainer = Trainer(config, payload, run, scaling, scratch)
        try:
            with _stopping_gently(run, payload.lease_epoch):
                trainer.fit()
        except TrainingFailedError as error:
            _raise_as_ours(error)


def _start_ray() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        ours = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # which Ray has replaced
    if len(ray.nodes()) == 1:  # nobody drains the only node, and the watcher is one process more to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for group in free_placement_groups():
        print(f"freed placement group {group}, left behind by a job that has ended", flush=True)


def _raise_as_ours(error: TrainingFailedError) -> None:
    worst = _worst(error)
    if isinstance(worst, Stopped):
        print(f"stopped: {worst}; the same command resumes the run", file=sys.stderr)
        sys.exit(143)
    raise WorkersFailed(str(worst), isinstance(worst, UserError) and _cause(worst) == "stop") from error


class Trainer(DataParallelTrainer):
    """Ray's trainer with our policies, and without what a run does not use but each restart would wait for."""

    def __init__(self, config: RunConfig, payload: Payload, run: Store, scaling: ScalingConfig, scratch: str) -> None:
        super().__init__(
            run_worker,
            train_loop_config=vars(payload),
            backend_config=Environment(),
            scaling_config=scaling,
            run_config=RayRun(storage_path=scratch, callbacks=[Signals()]),  # pyright: ignore[reportArgumentType]
        )
        parallel = config.parallel
        self._policies = {
            "failure_policy": Budgets(run, payload.lease_epoch, parallel.max_crashes, parallel.max_lost),
            "scaling_policy": Worlds(scaling, worlds(config), 60 * parallel.start_minutes, run),
        }

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        return super()._initialize_and_run_controller(**settings | self._policies)

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


class Environment(BackendConfig):
    """Announces the world to workers as torchrun does; they join it themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray calls when a group of workers has started."""
        return _EnvironmentBackend


class _EnvironmentBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_announce, address, port)


def _announce(address: str, port: int) -> None:
    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )


class Signals(WorkerCallback):
    """Lets a worker hear that it or its node is to go; only the main thread may set signal handlers."""

    def after_init_train_context(self) -> None:
        """Called by Ray on each worker's main thread."""
        preemption = get_train_context().preemption_context
        listen(lambda: preemption.preemption_info is not None)


def newest_commit(run: Store) -> str:
    """Name of a run's newest committed checkpoint, '' when there is none; later ones compare greater."""
    return max((name for name in run.list("checkpoints") if name.endswith(f"/{MARKER}")), default="")


def cause_of(error: TrainingFailedError) -> Cause:
    """Judge a failure by all workers' errors: a mistake of one outweighs that others lost it."""
    return _cause(_worst(error))


def _failures(error: TrainingFailedError) -> list[BaseException]:
    if isinstance(error, WorkerGroupError):
        return list(error.worker_failures.values())
    return [error.controller_failure if isinstance(error, ControllerError) else error]


def _worst(error: TrainingFailedError) -> BaseException:
    return min(_failures(error), key=lambda failure: _WEIGHT.index(_cause(failure)))


def _cause(error: BaseException) -> Cause:
    if isinstance(error, WorkerHealthCheckFailedError) and getattr(error.health_check_failure, "preempted", False):
        return "free"
    for kind, cause in _CAUSES:
        if isinstance(error, kind):
            return cause
    return "crash"


class Budgets(FailurePolicy):
    """Restarts after a failure as long as it is worth it; a newer checkpoint refills the budgets."""

    def __init__(
        self, run: Store, lease_epoch: int, crashes: int, lost: int, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(FailureConfig(max_failures=-1))
        self._run, self._epoch, self._sleep = run, lease_epoch, sleep
        self._limits: Mapping[Cause, float] = {"crash": crashes, "lost": lost, "free": math.inf, "start": math.inf}
        self._spent: Counter[Cause] = Counter()
        self._newest = newest_commit(run)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Called by Ray's controller once for each failure of a group of workers."""
        cause = cause_of(training_failed_error)
        with suppress(StoreUnavailable):  # then no checkpoint was committed either
            newest = newest_commit(self._run)
            if newest != self._newest:
                self._newest = newest
                self._spent.clear()
        self._spent[cause] += 1
        spent, limit = self._spent[cause], self._limits.get(cause, 0)
        again = spent <= limit and not (cause == "free" and self._stop_asked())
        print(_report(cause, spent, limit, again, training_failed_error), flush=True)
        if again:
            record(self._run, {"event": "lost", "cause": _SAID.get(cause, cause)})
            self._sleep(pause(self._spent.total()))
        return FailureDecision.RETRY if again else FailureDecision.RAISE

    def _stop_asked(self) -> bool:
        try:
            return asked_to_stop(self._run, self._epoch)
        except StoreUnavailable:
            return False


def pause(failures: int) -> float:
    """Seconds before the restart after so many failures in a row without a new checkpoint."""
    return 0.0 if failures <= 2 else min(_LONGEST_PAUSE, 2.0 ** (failures - 2))


def _report(cause: Cause, spent: int, limit: float, again: bool, error: TrainingFailedError) -> str:
    of = f", {spent} of {limit:g} since the last checkpoint" if limit < math.inf else ""
    text = " ".join(str(_worst(error)).strip().split("\n")[-1].split())[:300]
    return f"{_SAID.get(cause, 'training failed')}{of}: {'restarting' if again else 'giving up'} ({text})"


def worlds(config: RunConfig) -> list[int]:
    """Numbers of workers that a run may go on with, the best first: they divide its canonical partitions."""
    parallel, data = config.parallel, config.data
    partitions = canonical_partitions(data.partitions, data.batch_size)
    least = parallel.workers if parallel.min_workers is None else parallel.min_workers
    return [n for n in range(parallel.workers, least - 1, -1) if partitions % n == 0]


def room(needed: Mapping[str, float], free: Mapping[str, Mapping[str, float]]) -> int:
    """Number of workers that fit on nodes with these free resources."""
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items() if amount > 0)
        for node in free.values()
    )


def free_resources() -> dict[str, dict[str, float]]:
    """What each living node has free, by its address."""
    available = available_resources_per_node()
    return {node["NodeManagerAddress"]: available.get(node["NodeID"], {}) for node in ray.nodes() if node["Alive"]}


class Worlds(ScalingPolicy):
    """Starts the largest world there is room for, waits while there is room for none, and grows after a checkpoint."""

    def __init__(
        self,
        scaling_config: ScalingConfig,
        sizes: Sequence[int],
        patience: float,
        run: Store,
        free: Callable[[], Mapping[str, Mapping[str, float]]] = free_resources,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(scaling_config)
        self._sizes, self._patience, self._run, self._free, self._sleep = sizes, patience, run, free, sleep
        self._needed = cast(dict[str, float], scaling_config.resources_per_worker)
        self._waiting_since: float | None = None
        self._looked, self._seen = -math.inf, None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask no autoscaling coordinator, an actor that every run would start; the placement group asks."""

    async def before_controller_shutdown(self) -> None:
        """Nothing was asked for."""

    def before_controller_abort(self) -> None:
        """Nothing was asked for."""

    def _get_num_workers_for_resource_request(self) -> int:
        return self._sizes[0]

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Called by Ray's controller until a group has started."""
        now = time.monotonic()
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        waited = now - self._waiting_since
        size = self._fitting(settled=waited >= _SETTLE_SECONDS)
        if size is not None and (len(self._sizes) > 1 or waited < self._patience):
            return ResizeDecision(size, self._needed)
        if waited >= self._patience:
            raise MissingWorkers(self._missing(waited))
        self._sleep(0.5)
        return NoopDecision()

    def _fitting(self, settled: bool) -> int | None:
        if len(self._sizes) == 1:
            return self._sizes[0]  # Ray waits for the room
        there = room(self._needed, self._free())
        size = next((size for size in self._sizes if size <= there), None)
        return size if settled or size == self._sizes[0] else None

    def _missing(self, waited: float) -> str:
        each = " + ".join(f"{amount:g} {name}" for name, amount in self._needed.items())
        free = "; ".join(
            f"{node}: " + ", ".join(f"{there.get(name, 0):g} {name}" for name in self._needed)
            for node, there in self._free().items()
        )
        return (
            f"no room for {self._sizes[-1]} workers of {each} each within parallel.start_minutes={waited / 60:.3g}; "
            f"free are {free or 'no nodes'}: add nodes, stop other jobs, or lower parallel.workers or min_workers"
        )

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Called by Ray's controller at every health check."""
        self._waiting_since = None
        world, now = len(worker_group_state.workers), time.monotonic()
        if world == self._sizes[0] or now - self._looked < _LOOK_SECONDS:
            return NoopDecision()
        self._looked = now
        return self._grown(world)

    def _grown(self, world: int) -> ScalingDecision:
        """Take free room right after a checkpoint, when next to nothing has to be done again."""
        with suppress(StoreUnavailable):
            seen, self._seen = self._seen, newest_commit(self._run)
            if seen not in (None, self._seen):
                there = world + room(self._needed, self._free())
                size = next(size for size in self._sizes if size <= there)
                if size > world:
                    print(f"room for {size} workers: going on with them from the newest checkpoint", flush=True)
                    return ResizeDecision(size, self._needed)
        return NoopDecision()


@contextmanager
def _stopping_gently(run: Store, lease_epoch: int) -> Generator[None]:
    """Answer the first SIGTERM by asking the workers for a last checkpoint; the second, or time, ends the driver."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> None:
        sys.exit(143)

    def ask(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, leave)
        signal.alarm(GRACE_SECONDS)
        threading.Thread(target=ask_to_stop, args=(run, lease_epoch), daemon=True).start()

    before = signal.signal(signal.SIGTERM, ask), signal.signal(signal.SIGALRM, leave)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])


def free_placement_groups() -> list[str]:
    """Remove the placement groups that jobs which have ended left behind, and return their ids."""
    left = stale_placement_groups()
    for identifier in left:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identifier))))
    return left


def stale_placement_groups() -> list[str]:
    """Ids of the placement groups that jobs which have ended left behind.

    Ray frees a group when its job and the actor that made it have both ended; a killed driver may leave the actor.
    Detached groups are meant to outlive their job, and stay.
    """
    from ray.util.state import list_jobs, list_placement_groups
    from ray.util.state.exception import RayStateApiException

    try:
        ended = {job.job_id for job in list_jobs() if job.status in ("SUCCEEDED", "FAILED", "STOPPED")}
        groups: list[Any] = [group for group in list_placement_groups(detail=True) if group.state != "REMOVED"]  # pyright: ignore[reportAttributeAccessIssue]
    except RayStateApiException:  # it needs the dashboard, which training does not
        return []
    return [g.placement_group_id for g in groups if g.creator_job_id in ended and not g.is_detached]
