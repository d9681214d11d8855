"""One worker process: its place in the world, its device and its arithmetic."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from datasets_prep.errors import UserError
from service.config import Compute

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Worker:
    """Position among the ranks, and the device to compute on."""

    rank: int
    world: int
    hosts: int
    device: torch.device

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Context of the forward pass: autocast to bf16 or fp16, or nothing."""
        if precision not in _AUTOCAST:
            return nullcontext()
        return torch.autocast(self.device.type, _AUTOCAST[precision])

    def environment(self) -> dict[str, str | int]:
        """Describe what the bits of a result depend on besides config, code and data."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "torch": torch.__version__,
            "device": device,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "world": self.world,
        }


def start_worker(compute: Compute) -> Worker:
    """Join the world that torchrun or Ray Train announced in the environment, and set this process's arithmetic."""
    cuda = compute.device == "cuda" or (compute.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("compute.device=cuda, and torch sees no CUDA device: use compute.device=cpu, or a GPU machine")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if torch.are_deterministic_algorithms_enabled() != compute.deterministic:  # the call imports the compiler
        torch.use_deterministic_algorithms(compute.deterministic)
    torch.backends.cudnn.benchmark = not compute.deterministic
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Worker(rank, world, max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world))), device)
