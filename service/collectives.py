"""Collectives that gradients flow through, and norms of sharded tensors; the identity in a single process.

Convention: every rank's loss is a term whose mean over ranks is the global loss. The backward passes below
sum over ranks, DDP then averages parameter gradients, and the result is the gradient of the global loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def world_size() -> int:
    """Processes in the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Position in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllReduceSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


class _AllGatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # gloo has no reduce-scatter
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum `x` of any shape over ranks; the gradient is summed over ranks too."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)  # pyright: ignore[reportReturnType]


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate (B, …) of every rank to (world · B, …) in rank order; B must be equal on all ranks."""
    return x if world_size() == 1 else _AllGatherRows.apply(x)  # pyright: ignore[reportReturnType]


def from_rank_0(value: Any) -> Any:
    """Give every rank what rank 0 passed: a small object that can be pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def own_group() -> dist.ProcessGroup | None:
    """Make a gloo group of all ranks, for objects and for a thread of its own; None for one process. Collective."""
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo")
    dist.barrier(group)  # connect now: who dies before the first collective would be waited for without end
    return group


def on_rank_0(function: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Call on rank 0 alone; every rank of `group` gets what it returned, or raises what it raised."""
    if group is None:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # noqa: BLE001  (it is raised below)
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Give every rank of `group` what each of them passed, by rank: small objects that can be pickled."""
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Give what this rank holds of each tensor: its shard, or all of it; in-place changes reach the tensor."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    """Say whether this is a `DTensor`, whose class costs seconds to import."""
    return hasattr(tensor, "to_local")


def shard_group(tensor: Any) -> dist.ProcessGroup | None:
    """Give the ranks that hold the parts of a tensor, none where each holds all of it."""
    if not is_sharded(tensor):
        return None
    axis = next(axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(axis)


@torch.no_grad()
def norms(parts: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """L2 norm of each tensor, (n,), by one all-reduce over the ranks that hold its parts; equal on all of them."""
    found = torch.stack(torch._foreach_norm(parts))
    if group is None:
        return found
    squares = found.double().square()
    dist.all_reduce(squares, group=group)
    return squares.sqrt().to(found.dtype)


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all tensors together, a scalar, equal on all ranks: all tensors are sharded alike, or none is."""
    tensors = list(tensors)
    return torch.linalg.vector_norm(norms(local(tensors), shard_group(tensors[0])))


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a detached tensor over ranks, for reporting."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()
