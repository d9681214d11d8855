"""Exponential moving average of a module's weights, for evaluation."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from service.collectives import local


class WeightAverage(nn.Module):
    """A copy that follows a module: w̄ ← m·w̄ + (1 − m)·w, from the weights it had when the copy was made.

    Running statistics are averaged alike, counters copied. torch's `AveragedModel` waits for the device at every
    update.
    """

    def __init__(self, module: nn.Module, momentum: float) -> None:
        super().__init__()
        self.module = deepcopy(module).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Follow one step."""
        mine, theirs = _tensors(self.module), _tensors(module)
        floats = [i for i, tensor in enumerate(mine) if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[i] for i in floats], [theirs[i] for i in floats], 1 - self.momentum)
        for i in set(range(len(mine))) - set(floats):
            mine[i].copy_(theirs[i])


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in local((*module.parameters(), *module.buffers()))]
