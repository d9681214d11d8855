"""Run a function on several gloo ranks and return what each returned.

The processes serve all tests of a file; they are forks of one that has imported what takes long.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_IMPORTED = ["torch.distributed.fsdp", "service.models.vit", "service.engine.loop", "tests.families"]
_pool: list[tuple[Any, Connection]] = []  # a process and our end of its pipe, by rank


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            world, hosts, rendezvous, environ, task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        local = world // hosts
        os.environ.update(environ, RANK=str(rank), LOCAL_RANK=str(rank % local))
        os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(local))
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        function, args = pickle.loads(task)  # in the environment that their modules are to see
        answer = function(*args)  # a failure ends the process, after its traceback
        dist.barrier()
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))


def _start(world: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    while len(_pool) < world:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(len(_pool), theirs), daemon=True)
        process.start()
        theirs.close()
        _pool.append((process, ours))


def stop_ranks() -> None:
    """End the processes."""
    while _pool:
        process, pipe = _pool.pop()
        pipe.close()
        process.kill()
        process.join()


def on_ranks(world: int, function: Callable[..., Any], *args: Any, hosts: int = 1) -> list[Any]:
    """Call `function(*args)` on each of `world` ranks; it must be importable, as the processes import it."""
    _start(world)
    pipes = [pipe for _, pipe in _pool[:world]]
    with tempfile.TemporaryDirectory() as folder:
        for pipe in pipes:
            task = world, hosts, f"{folder}/rendezvous", dict(os.environ), pickle.dumps((function, args))
            pipe.send_bytes(pickle.dumps(task))
        answers: dict[int, Any] = {}
        while len(answers) < world:
            for pipe in wait([p for i, p in enumerate(pipes) if i not in answers]):
                rank = pipes.index(pipe)  # pyright: ignore
                try:
                    answers[rank] = pickle.loads(pipes[rank].recv_bytes())
                except EOFError:
                    stop_ranks()  # the others may wait for this one for ever
                    raise RuntimeError(f"rank {rank} of {world} failed") from None
    return [answers[rank] for rank in range(world)]
