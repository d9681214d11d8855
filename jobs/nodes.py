"""What the nodes of a cluster say of themselves: `python -m jobs.nodes [JSON]`, as a Ray job.

One task on each node examines it and reaches for the store and the data from there; then one rank a GPU, or one a
node where there is none, joins an all-reduce. One line of the job's log is the answer, as JSON.
"""

from __future__ import annotations

import json
import logging
import socket
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import doctor
from datasets_prep.errors import UserError
from jobs.probe import PLACE, SECONDS, probe_store
from service.data.cache import cache_root
from service.data.split import read_index
from service.data.store import Store

ANSWER = "answer "  # begins the line of the log that is for programs
_TASK_SECONDS = 40.0
_JOIN_SECONDS = 20.0
_TRIES = 3
T = TypeVar("T")
K = TypeVar("K")
_BYTES = {"nccl": 256 << 20, "gloo": 16 << 20}


def main(arguments: Sequence[str]) -> int:
    """Ask every node and print the answer."""
    start_ray()
    answer(survey(**json.loads(arguments[0]) if arguments else {}))
    return 0


def start_ray() -> None:
    """Join the cluster that the job runs on."""
    ray.init(log_to_driver=False, logging_level=logging.ERROR)


def answer(row: Mapping[str, Any]) -> None:
    """Print what the job's log is read for."""
    print(f"{ANSWER}{json.dumps(row)}", flush=True)


def survey(storage: str | None = None, data: str | None = None, tracking: str | None = None) -> dict[str, Any]:
    """Facts of all nodes that answer, those that do not, and what an all-reduce between the nodes gave."""
    there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    with _left_behind(storage) as left:
        found, silent = on_nodes(there, examine, storage, data, tracking, left)
    for key, facts in found.items():
        resources = there[key]["Resources"]
        facts |= {"address": there[key]["NodeManagerAddress"], "clock": _clock(key)}
        facts |= {"ray_cpus": resources.get("CPU", 0.0), "ray_gpus": resources.get("GPU", 0.0)}
    return {
        "nodes": list(found.values()),
        "silent": {there[key]["NodeManagerAddress"]: reason for key, reason in silent.items()},
        "all_reduce": all_reduce(found),
    }


def on_nodes(nodes: Iterable[str], function: Callable[..., T], *arguments: Any) -> tuple[dict[str, T], dict[str, str]]:
    """Call a function on each node; returns the answers, and why there is none, by the node's id."""
    return _gathered({key: _pinned(function, key).remote(*arguments) for key in nodes})


def _pinned(function: Callable[..., Any], node: str, **needs: float) -> Any:
    """The function as a task of one node, which waits for no CPU."""
    remote: Any = ray.remote(function)
    return remote.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **needs)


def _gathered(calls: Mapping[K, Any]) -> tuple[dict[K, Any], dict[K, str]]:
    answers: dict[K, Any] = {}
    failures: dict[K, str] = {}
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=_TASK_SECONDS)
    for key, call in calls.items():
        try:
            answers[key] = ray.get(call, timeout=0.1)
        except GetTimeoutError:
            failures[key] = f"no answer within {_TASK_SECONDS:g} s"
        except RayError as error:
            failures[key] = " ".join(str(error).strip().splitlines()[-1].split())[:300]
    for key in failures:
        with suppress(RayError):
            ray.cancel(calls[key], force=True)
    return answers, failures


def _clock(node: str) -> tuple[float, float] | None:
    """Seconds by which a node's clock is ahead, and the uncertainty: the best of some questions to a warm process."""
    task = _pinned(_time, node)
    offsets: list[tuple[float, float]] = []
    for _ in range(_TRIES):
        before = time.time()
        with suppress(RayError):
            there: Any = ray.get(task.remote(), timeout=SECONDS)
            offsets.append(doctor.offset(there, before, time.time()))
    return min(offsets, key=lambda each: each[1], default=None)


def _time() -> float:
    return time.time()


def examine(storage: str | None, data: str | None, tracking: str | None, left: str | None) -> dict[str, Any]:
    """Facts of this node; seconds that the store takes from here, or what fails there; a port that is free."""
    facts = doctor.examine([cache_root()])
    with socket.socket() as probe:
        probe.bind(("", 0))
        facts["port"] = probe.getsockname()[1]
    facts["tracking"] = tracking is not None and doctor.http_offset(tracking) is not None
    if storage is not None:
        try:
            facts["store"] = probe_store(storage)
            if left is not None:
                _see(storage, left)
        except UserError as error:
            facts["store_error"] = str(error)
    if data is not None:
        try:
            facts["fingerprint"] = read_index(Store(data, SECONDS)).fingerprint
        except UserError as error:
            facts["data_error"] = str(error)
    return facts


@contextmanager
def _left_behind(storage: str | None) -> Generator[str | None]:
    """Name of an object that this process wrote for the nodes to see; None where it could not."""
    if storage is None:
        yield None
        return
    store, name = Store(storage, SECONDS).sub(PLACE), f"{uuid.uuid4().hex}-shared"
    try:
        store.put(name, b"seen")
    except UserError:  # as every node is about to report for itself
        yield None
        return
    try:
        yield name
    finally:
        with suppress(UserError):
            store.delete(name)


def _see(storage: str, name: str) -> None:
    store = Store(storage, SECONDS).sub(PLACE)
    if not store.exists(name):
        raise UserError(
            f"{store.uri} lacks what another node wrote there: use a folder that all nodes see, or an s3:// address"
        )


def all_reduce(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sum a tensor over one rank a free GPU or, where there is none, one a node and at least two."""
    ranks, backend = _ranks(nodes)
    if len(ranks) < 2:
        return {"skipped": f"of the GPUs {len(ranks)} is free, and an all-reduce takes two"}
    first = nodes[ranks[0]]
    needs = {"num_gpus": 1.0} if backend == "nccl" else {}
    calls = {
        rank: _pinned(join, node, **needs).remote(rank, len(ranks), first["address"], first["port"], backend)
        for rank, node in enumerate(ranks)
    }
    answers, failures = _gathered(calls)
    facts = {"ranks": len(ranks), "nodes": len(set(ranks)), "backend": backend, "bytes": _BYTES[backend]}
    if failures:
        return facts | {"error": next(iter(failures.values()))}
    right = all(right for right, _ in answers.values())
    return facts | {"right": right, "seconds": max(seconds for _, seconds in answers.values())}


def _ranks(nodes: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], str]:
    """The node of each rank, and the backend that joins them."""
    if any(node["ray_gpus"] for node in nodes.values()):
        free = available_resources_per_node()
        return [key for key in nodes for _ in range(int(free.get(key, {}).get("GPU", 0)))], "nccl"
    return list(nodes) if len(nodes) > 1 else list(nodes) * 2, "gloo"


def join(rank: int, world: int, address: str, port: int, backend: str) -> tuple[bool, float]:
    """Take part in all-reduces of one tensor: whether the sum was right, and the median seconds of one."""
    import torch
    import torch.distributed as dist

    device = "cuda" if backend == "nccl" else "cpu"
    there = f"tcp://{address}:{port}"
    limit = timedelta(seconds=_JOIN_SECONDS)
    dist.init_process_group(backend, init_method=there, rank=rank, world_size=world, timeout=limit)
    try:
        x = torch.full((_BYTES[backend] // 4,), rank + 1.0, device=device)
        dist.all_reduce(x)
        right = bool((x == world * (world + 1) / 2).all())
        seconds: list[float] = []
        for _ in range(_TRIES):
            x.zero_()
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(x)
            x[0].item()  # on a GPU, waits for the sum
            seconds.append(time.perf_counter() - begin)
        return right, statistics.median(seconds)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    from jobs import nodes  # under the name that the nodes import it by

    sys.exit(nodes.main(sys.argv[1:]))
