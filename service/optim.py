"""Optimisers and the learning-rate schedule: tensors and numbers in, no config objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling over momentum SGD (You, Gitman and Ginsburg 2017, algorithm 1).

    For each tensor of a group with `adapt`: g ← g + wd·w; r = η‖w‖/‖g‖ (of the decayed gradient, as VICReg's code has
    it); g ← r·g, or min(r/lr, 1)·g with `clip_lr`, which makes lr the ceiling of the layer's rate. Then for all:
    v ← m·v + g; w ← w − lr·v. Groups without `adapt` (biases, norms) take plain momentum SGD without decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.02,
        clip_lr: bool = True,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        defaults |= {"clip_lr": clip_lr, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step for all groups, with multi-tensor kernels and no host synchronisation."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params]
        if group["adapt"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_mul_(grads, self._rates(group, params, grads))
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        velocity = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, grads)
        torch._foreach_add_(params, velocity, alpha=-group["lr"])

    @staticmethod
    def _rates(group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Trust ratios, 0-dimensional tensors; 1 where a norm is zero."""
        weights, slopes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
        ratio = group["trust"] * weights / slopes
        if group["clip_lr"]:
            ratio = (ratio / group["lr"]).clamp(max=1.0)
        return list(torch.where((weights > 0) & (slopes > 0), ratio, 1.0).unbind())


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into matrices, which decay, and vectors (biases, norm scales), which neither decay nor adapt."""
    params = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def build_optimizer(kind: str, module: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    """Build `lars`, `sgd` or `adamw` (the fused kernels of torch) over the parameters of `module`."""
    groups = param_groups(module, weight_decay)
    if kind == "lars":
        groups[1]["adapt"] = False
        return Lars(groups, lr, **options)
    if kind == "sgd":
        return SGD(groups, lr, fused=True, **options)
    return AdamW(groups, lr, fused=True, **options)


def warmup_cosine(step: int, *, total: int, warmup: int, lr: float, start_lr: float, min_lr: float) -> float:
    """Learning rate of `step` (from 0): linear from `start_lr` to `lr` in `warmup` steps, then cosine to `min_lr`.

    Step 0 takes `start_lr` when there is a warm-up, step `warmup` takes `lr`, step `total − 1` nearly `min_lr`.
    """
    if step < warmup:
        return start_lr + (lr - start_lr) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give all groups the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
