"""How a family is spread over workers: whole on each of them (DDP), or in shards that are joined for use (FSDP2).

Either way gradients are means over workers, so that both take the same steps (`service.collectives`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from datasets_prep.errors import UserError
from service.collectives import is_sharded
from service.config import Compute, Parallel, RunConfig
from service.engine.worker import Worker
from service.families.base import Family
from service.models.batchnorm import synchronise


def place(family: Family, worker: Worker, compute: Compute, parallel: Parallel) -> Family:
    """Move a family to the worker's device and number format, with batch norm over all ranks if asked for."""
    if parallel.sync_batchnorm and worker.world > 1:
        family = synchronise(family, cuda=worker.device.type == "cuda")  # pyright: ignore[reportAssignmentType]
    family = family.to(worker.device, torch.float64 if compute.precision == "fp64" else torch.float32)
    if compute.channels_last and not _shards(worker, parallel):  # FSDP refuses such weights; the images suffice
        return family.to(memory_format=torch.channels_last)
    return family


def _shards(worker: Worker, parallel: Parallel) -> bool:
    return parallel.kind == "fsdp" and worker.world > 1


@dataclass(frozen=True)
class Wrapped:
    """A family made ready for training: the module to call, and whole copies of what it holds in shards."""

    module: nn.Module
    layouts: Mapping[nn.Module, nn.Module]  # of each sharded module that `full` is asked for: a copy without values

    @torch.no_grad()
    def full(self, module: nn.Module) -> nn.Module:
        """Give a plain copy of a sharded module, the same on all ranks, who all have to call; others as they are."""
        if module not in self.layouts:
            return module
        mine, theirs = deepcopy(self.layouts[module]), _tensors(module)
        mine.to_empty(device=theirs[0].device)
        for tensor, held in zip(_tensors(mine), theirs, strict=True):
            tensor.copy_(held.full_tensor() if is_sharded(held) else held)  # pyright: ignore
        return mine


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def wrap(family: Family, worker: Worker, config: RunConfig, averaged: nn.Module | None = None) -> Wrapped:
    """Wrap a placed family for training, compiled if asked for.

    Args:
        family: equal on all ranks: seeds and files see to that. Its modules with `fsdp_unit` are sharded one by one.
        worker: this process.
        config: of the run; `parallel.kind` and `parallel.shard` choose.
        averaged: a copy of the encoder that follows it, sharded alike.
    """
    if _shards(worker, config.parallel):
        return _fsdp(family, worker, config, averaged)
    if config.compute.compile:  # not the losses, whose collectives would break the graph
        family.embed = torch.compile(family.embed)
    if worker.world == 1:
        return Wrapped(family, {})
    with warnings.catch_warnings():  # the name that torch is about to prefer is unknown to 2.11
        warnings.simplefilter("ignore", FutureWarning)
        # Running statistics stay each rank's own while training; rank 0's count (`share_buffers`).
        return Wrapped(DistributedDataParallel(family, gradient_as_bucket_view=True, broadcast_buffers=False), {})


def _fsdp(family: Family, worker: Worker, config: RunConfig, averaged: nn.Module | None) -> Wrapped:
    """Shard a family by `fully_shard`, unit by unit, so that no more than some units are whole at a time."""
    beside = [] if averaged is None else [averaged]
    layouts = {module: deepcopy(module).to("meta") for module in (family.encoder, *family.others.values(), *beside)}
    units = [module for module in family.modules() if getattr(module, "fsdp_unit", False)]
    dtype = next(family.parameters()).dtype
    options: dict[str, Any] = {
        "mesh": _mesh(worker, config.parallel),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=dtype, cast_forward_inputs=False),  # autocast casts
    }
    for unit in units:
        if config.compute.compile:  # each by itself: the hooks between them would break the graph
            unit.compile()
        fully_shard(unit, **options)
    for module in (family, *beside):
        fully_shard(module, **options)
    for module in (*units, family):
        module.set_force_sum_reduction_for_comms(worker.device.type == "cpu")  # gloo may take a mean for a sum
    return Wrapped(family, layouts)


def _mesh(worker: Worker, parallel: Parallel) -> DeviceMesh:
    """Give the ranks that share a set of parameters: all, or those of each host."""
    if parallel.shard == "all":
        return init_device_mesh(worker.device.type, (worker.world,), mesh_dim_names=("shard",))
    sizes: list[int] = [0] * worker.world
    dist.all_gather_object(sizes, int(os.environ.get("LOCAL_WORLD_SIZE", worker.world)))
    if len(set(sizes)) > 1:
        raise UserError(
            f"parallel.shard=host needs as many workers on each host, and they have {sorted(set(sizes))}: "
            "use parallel.shard=all, or a number of workers that fills the hosts"
        )
    shape = worker.world // sizes[0], sizes[0]
    return init_device_mesh(worker.device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def exchanging(module: nn.Module, now: bool) -> Generator[None]:
    """Let backward passes of a wrapped family average gradients over ranks, or leave them to a later one that does."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
        module.set_is_last_backward(now)
        yield
    elif isinstance(module, DistributedDataParallel) and not now:
        with module.no_sync():  # pyright: ignore
            yield
    else:
        yield


def share_buffers(module: nn.Module) -> None:
    """Give all ranks rank 0's buffers, such as batch norm's running statistics."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
