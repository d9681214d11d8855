"""What is done about failing workers: which failures are worth a restart, and with how many workers."""

import inspect
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import ray.cloudpickle
from ray.exceptions import ActorDiedError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from datasets_prep.errors import UserError
from jobs import supervise, worker
from jobs.plan import check_resources
from jobs.supervise import Budgets, MissingWorkers, Trainer, Worlds, cause_of
from jobs.worker import GivenUp, Payload, PeerLost, Stopped, WorkersFailed, is_peer_lost
from service.data.store import NotFound, Store, StoreUnavailable
from service.engine.goodput import read_events
from service.engine.lease import Lease, LeaseLost, ask_to_stop, check_lease
from tests.configs import tiny

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
DEAD = WorkerHealthCheckFailedError("gone", ActorDiedError())


def preempted():
    failure = ActorDiedError()
    failure._preempted = True
    return WorkerHealthCheckFailedError("gone", failure)


def of_workers(*errors):
    """As the controller gets it: what workers raised, by rank, and through Ray's pickling."""
    return ray.cloudpickle.loads(ray.cloudpickle.dumps(WorkerGroupError("text", dict(enumerate(errors)))))


@pytest.mark.parametrize(
    ("errors", "cause"),
    [
        ([UserError("data.uri=x: no such data set")], "stop"),
        ([NotFound("s3://bucket/x does not exist")], "stop"),
        ([StoreUnavailable("s3://bucket/x gave no answer for 60 s")], "lost"),
        ([GivenUp("the loss is nan")], "stop"),
        ([LeaseLost("epoch 2 is newer")], "stop"),
        ([Stopped("after step 7"), Stopped("after step 7")], "free"),
        ([PeerLost("closed by peer")], "lost"),
        ([DEAD, PeerLost("closed by peer")], "lost"),
        ([WorkerHealthCheckTimeoutError("silent")], "lost"),
        ([preempted(), PeerLost("closed by peer")], "free"),
        ([Stopped("after step 7"), DEAD], "free"),
        ([ValueError("a bug"), PeerLost("closed by peer")], "crash"),
        ([RuntimeError("out of memory")], "crash"),
        ([PeerLost("closed by peer"), UserError("unreadable"), ValueError("a bug")], "stop"),
    ],
)
def test_the_cause_of_a_failure_is_the_gravest_of_its_workers(errors, cause):
    assert cause_of(of_workers(*errors)) == cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (WorkerGroupStartupTimeoutError(2), "start"),
        (WorkerGroupStartupFailedError("died"), "start"),
        (MissingWorkers("no room"), "stop"),
        (ActorDiedError(), "lost"),
        (KeyError("x"), "crash"),
    ],
)
def test_a_failure_of_the_start_is_judged_too(error, cause):
    assert cause_of(ControllerError(error)) == cause


def commit(run, step):
    run.put(f"checkpoints/step-{step:08d}-lease-0001/COMMIT.json", b"{}")


def budgets(run, crashes=1, lost=3):
    slept = []
    return Budgets(run, 1, crashes, lost, slept.append), slept


def test_crashes_and_lost_workers_have_budgets_that_a_checkpoint_refills(tmp_path, capsys):
    run = Store(tmp_path)
    commit(run, 10)
    policy, slept = budgets(run)
    decide = [policy.make_decision(of_workers(error)) for error in (ValueError("a bug"), DEAD, DEAD, DEAD)]
    assert decide == [RETRY] * 4
    assert slept == [0, 0, 2, 4]
    told = [(event["event"], event["cause"]) for event in read_events(run)]
    assert told == [("lost", "a worker failed")] + [("lost", "workers lost")] * 3
    commit(run, 20)
    assert [policy.make_decision(of_workers(ValueError("a bug"))) for _ in range(2)] == [RETRY, RAISE]
    assert [policy.make_decision(of_workers(DEAD)) for _ in range(4)] == [RETRY] * 3 + [RAISE]
    out = capsys.readouterr().out
    assert "a worker failed, 1 of 1 since the last checkpoint: restarting (a bug)" in out
    assert "workers lost, 4 of 3 since the last checkpoint: giving up" in out


def test_bad_input_is_not_tried_again_and_preemption_always(tmp_path):
    policy, slept = budgets(Store(tmp_path), crashes=5, lost=5)
    assert policy.make_decision(of_workers(UserError("no such data set"))) == RAISE
    assert [policy.make_decision(of_workers(preempted())) for _ in range(9)] == [RETRY] * 9
    assert max(slept) == supervise._LONGEST_PAUSE and slept == sorted(slept)


def test_workers_that_stopped_start_again_unless_the_run_was_asked_to_stop(tmp_path):
    run = Store(tmp_path)
    policy, _ = budgets(run)
    assert policy.make_decision(of_workers(Stopped("after step 7"))) == RETRY
    ask_to_stop(run, 1)
    assert policy.make_decision(of_workers(Stopped("after step 9"))) == RAISE
    with pytest.raises(SystemExit) as left:
        supervise._raise_as_ours(of_workers(Stopped("after step 9"), Stopped("after step 9")))
    assert left.value.code == 143


def test_bad_input_is_told_from_what_failed():
    for error, user in [(UserError("no such data set"), True), (StoreUnavailable("away"), False), (DEAD, False)]:
        with pytest.raises(WorkersFailed) as failed:
            supervise._raise_as_ours(of_workers(PeerLost("closed by peer"), error))
        assert failed.value.user is user


def test_what_is_replaced_in_ray_is_there():
    assert {"failure_policy", "scaling_policy"} <= set(inspect.signature(TrainController.__init__).parameters)
    source = inspect.getsource(DataParallelTrainer.fit)
    assert "_initialize_and_run_controller(" in source and "failure_policy=" in source and "scaling_policy=" in source
    assert "_create_default_callbacks()" in source


def test_policies_travel_to_the_controller(tmp_path):
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1.0})
    for policy in (Budgets(Store(tmp_path), 1, 2, 50), Worlds(scaling, [2, 1], 60, Store(tmp_path))):
        assert type(ray.cloudpickle.loads(ray.cloudpickle.dumps(policy))) is type(policy)
    assert pickle.loads(pickle.dumps(Stopped("x"))).args == ("x",)


def payload_of(config, folder):
    return Payload(config.plain(), str(folder), 1, "http://127.0.0.1:9", "run")


def test_the_policies_of_a_run_are_those_of_its_config(tmp_path):
    def policies(**changes):
        config = tiny(parallel__workers=2, **changes)
        scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1.0})
        made = Trainer(config, payload_of(config, tmp_path), Store(tmp_path), scaling, str(tmp_path))._policies
        return made["failure_policy"].make_decision, made["scaling_policy"]

    for name, error in [("max_crashes", ValueError("a bug")), ("max_lost", DEAD)]:
        assert policies(**{f"parallel__{name}": 0})[0](of_workers(error)) == RAISE
        assert policies(**{f"parallel__{name}": 1})[0](of_workers(error)) == RETRY
    impatient = policies(parallel__start_minutes=1e-9)[1]
    assert size_of(impatient.make_decision_for_non_running_worker_group()) == 2
    impatient._free = dict
    with pytest.raises(MissingWorkers, match="free are no nodes"):
        impatient.make_decision_for_non_running_worker_group()
    assert policies()[1]._get_num_workers_for_resource_request() == 2
    fewer = policies(parallel__min_workers=1)[1]
    fewer._free = dict
    assert isinstance(fewer.make_decision_for_non_running_worker_group(), NoopDecision)


def test_a_worker_without_progress_ends_itself(tmp_path):
    config = tiny(parallel__hang_minutes=0.001, data__deadline_minutes=0.0005)
    code = "import sys, json; from jobs.worker import run_worker; run_worker(json.load(sys.stdin))"
    told = json.dumps(vars(payload_of(config, tmp_path)))
    hung = subprocess.run([sys.executable, "-c", code], input=told, capture_output=True, text=True, timeout=60)
    assert hung.returncode == 1 and "Timeout (0:00:00.060000)!" in hung.stderr


def test_sigterm_asks_training_to_stop(monkeypatch):
    monkeypatch.setattr(worker, "_asked", threading.Event())
    before = signal.getsignal(signal.SIGTERM)
    try:
        worker.listen(lambda: True)
        assert worker.stop_requested()
        worker.listen()
        assert not worker.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert worker.stop_requested()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("command", ["ask_to_stop(run, 1)", "Lease(run)"])
def test_rank_0_notices_that_it_is_to_stop(command, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_asked", asked := threading.Event())
    monkeypatch.setattr(worker, "WATCH_SECONDS", 0.01)
    run = SimpleNamespace(store=Store(tmp_path), lease_epoch=1, fence=lambda: check_lease(Store(tmp_path), 1))
    Lease(run.store)
    (tmp_path / "lease/000001.beat").write_text("0")
    with worker._watching(run):
        assert not asked.wait(0.1)
        exec(command, {"run": run.store, "ask_to_stop": ask_to_stop, "Lease": Lease})
        assert asked.wait(10)


def test_connection_errors_of_collectives_are_lost_peers():
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:17292."
    assert is_peer_lost(RuntimeError(gloo)) and is_peer_lost(ConnectionResetError(104, "Connection reset by peer"))
    assert not is_peer_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"))
    assert not is_peer_lost(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def test_worlds_divide_the_canonical_partitions():
    assert supervise.worlds(tiny(parallel__workers=8, parallel__min_workers=1)) == [8, 4, 2, 1]
    assert supervise.worlds(tiny(parallel__workers=8, parallel__min_workers=3)) == [8, 4]
    assert supervise.worlds(tiny(parallel__workers=4)) == [4]


def test_a_cluster_needs_room_for_the_fewest_workers():
    with pytest.raises(UserError, match=r"parallel.workers=4 .* needs 4 CPUs, the cluster has 2"):
        check_resources(tiny(parallel__workers=4), 2, 0)
    assert not check_resources(tiny(parallel__workers=4, parallel__min_workers=2), 2, 0)
    with pytest.raises(UserError, match=r"parallel.min_workers=2 .* needs 2 CPUs, the cluster has 1"):
        check_resources(tiny(parallel__workers=4, parallel__min_workers=2), 1, 0)


def test_room_counts_whole_workers_a_node():
    free = {"a": {"CPU": 3.0, "GPU": 1.0}, "b": {"CPU": 1.5}, "c": {}}
    assert supervise.room({"CPU": 1.0}, free) == 4
    assert supervise.room({"CPU": 1.0, "GPU": 1.0}, free) == 1
    assert supervise.room({"CPU": 0.1}, {"a": {"CPU": 0.3}}) == 3


def scaled(run, sizes, free, patience=math.inf):
    slept = []
    scaling = ScalingConfig(num_workers=sizes[0], resources_per_worker={"CPU": 1.0})
    return Worlds(scaling, sizes, patience, run, lambda: {"10.0.0.7": {"CPU": free[0]}}, slept.append), slept


def size_of(decision):
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def test_a_run_of_fixed_size_starts_and_ray_waits_for_the_room(tmp_path):
    policy, slept = scaled(Store(tmp_path), [2], [0])
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 2 and not slept


def test_an_elastic_run_starts_what_fits_once_the_room_has_settled(tmp_path, monkeypatch):
    free = [3]
    policy, slept = scaled(Store(tmp_path), [4, 2, 1], free)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision) and slept == [0.5]
    monkeypatch.setattr(supervise, "_SETTLE_SECONDS", 0)
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 2
    free[0] = 0
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision) and slept == [0.5, 0.5]
    free[0] = 4
    monkeypatch.setattr(supervise, "_SETTLE_SECONDS", math.inf)
    assert size_of(policy.make_decision_for_non_running_worker_group()) == 4


@pytest.mark.parametrize("sizes", [[2], [4, 2]])
def test_what_is_missing_is_told_when_the_room_does_not_come(sizes, tmp_path):
    policy, _ = scaled(Store(tmp_path), sizes, [1], patience=0)
    with pytest.raises(MissingWorkers, match=r"2 workers of 1 CPU each within parallel.start_minutes.*10.0.0.7: 1 CPU"):
        policy.make_decision_for_non_running_worker_group()


def test_an_elastic_run_grows_right_after_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "_LOOK_SECONDS", 0)
    run, free = Store(tmp_path), [0]
    policy, _ = scaled(run, [4, 2, 1], free)

    def look(world=1):
        return size_of(policy.make_decision_for_running_worker_group(SimpleNamespace(workers=[None] * world), None))

    assert look() is None
    commit(run, 10)
    assert look() is None  # no room
    free[0] = 2
    assert look() is None  # no new checkpoint
    commit(run, 20)
    assert look() == 2
    commit(run, 30)
    assert look(world=4) is None
