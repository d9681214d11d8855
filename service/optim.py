"""Optimisers, parameter groups and schedules: tensors and numbers in, no config objects."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from service.collectives import is_sharded, local, norms, shard_group

_LAYER = re.compile(r"(?:\w+_)?encoder\.(?:blocks\.(\d+)|layer(\d+)|(patch_embed|pos_embed|conv1|bn1))\b")


class _Foreach(Optimizer):
    """Optimiser of groups of tensors, by multi-tensor kernels and without host synchronisation.

    A rank updates its shards of sharded parameters; norms alone need the others', all those of a group at once.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step for all groups."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _held(self, name: str, params: list[Tensor]) -> list[Tensor]:
        """What this rank holds of one kind of state of some parameters."""
        return local(self.state[p][name] for p in params)


def _gradients(params: list[Tensor]) -> list[Tensor]:
    """What this rank holds of some parameters' gradients."""
    return local(p.grad for p in params if p.grad is not None)


def _norms_of_both(first: list[Tensor], second: list[Tensor], params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms of two tensors for each parameter, (n,) each; this rank holds as much of them as of the parameters."""
    both = norms([*first, *second], shard_group(params[0]))
    return both[: len(first)], both[len(first) :]


class Lars(_Foreach):
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

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        weights, grads = local(params), _gradients(params)
        if group["adapt"]:
            grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(grads, self._rates(group, *_norms_of_both(weights, grads, params)))
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        velocity = self._held("momentum", params)
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, grads)
        torch._foreach_add_(weights, velocity, alpha=-group["lr"])

    @staticmethod
    def _rates(group: dict[str, Any], weights: Tensor, slopes: Tensor) -> list[Tensor]:
        """Trust ratios of norms (n,), 0-dimensional tensors; 1 where a norm is zero."""
        ratio = group["trust"] * weights / slopes
        if group["clip_lr"]:
            ratio = (ratio / group["lr"]).clamp(max=1.0)
        return list(torch.where((weights > 0) & (slopes > 0), ratio, 1.0).unbind())


class Lamb(_Foreach):
    """Layer-wise adaptive rates over Adam (You et al. 2020, algorithm 2, with φ the identity).

    m ← β₁·m + (1 − β₁)·g; v ← β₂·v + (1 − β₂)·g²; u = m̂ / (√v̂ + ε) + wd·w, with m̂ and v̂ free of bias;
    w ← w − lr·(‖w‖/‖u‖)·u. Groups without `adapt` (biases, norms) take the ratio 1, that is Adam.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "adapt": True}
        super().__init__(params, defaults)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        steps = [self._advance(p) for p in params]
        weights, grads = local(params), _gradients(params)
        mean, square = self._held("exp_avg", params), self._held("exp_avg_sq", params)
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        scale = torch._foreach_div(square, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        update = torch._foreach_div(mean, [1 - beta1**step for step in steps])
        torch._foreach_div_(update, scale)
        torch._foreach_add_(update, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            sizes, changes = _norms_of_both(weights, update, params)
            ratio = torch.where((sizes > 0) & (changes > 0), sizes / changes, 1.0)
            torch._foreach_mul_(update, list(ratio.unbind()))
        torch._foreach_add_(weights, update, alpha=-group["lr"])

    def _advance(self, p: Tensor) -> float:
        """Count one more step of a parameter, on the CPU, where nothing waits."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        return state["step"].item()


_KINDS: dict[str, Callable[..., Optimizer]] = {"lars": Lars, "lamb": Lamb, "sgd": SGD, "adam": Adam, "adamw": AdamW}


def decays(name: str, parameter: Tensor) -> bool:
    """Say whether weight decay applies: to matrices and kernels, not to biases, norms, tokens and positions."""
    return parameter.ndim > 1 and name.endswith("weight")


def encoder_layer(name: str) -> int | None:
    """Layer of an encoder that a parameter of a family belongs to, counted from 0 for embedding or stem.

    Blocks of a ViT and stages of a ResNet follow. None is what comes after the last of them, and what is no encoder.
    """
    found = _LAYER.match(name)
    if found is None:
        return None
    block, stage, _ = found.groups()
    return int(block) + 1 if block else int(stage or 0)


def param_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    weight_decay_of: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Divide the trainable parameters of a family by rate and decay.

    With L encoder layers, layer l learns at layer_decay^(L − l) times the rate of all that follows (Bao et al. 2022).

    Args:
        module: family, not wrapped.
        weight_decay: of what `decays`.
        weight_decay_of: decay of the weights of some components, by the names of the family's children.
        layer_decay: ratio of the rates of an encoder's layer and the next one.

    Returns:
        Groups with `name`, `params`, `weight_decay`, `lr_scale`, `scheduled` (whether the decay follows the run's
        schedule) and `adapt` (whether LARS and LAMB scale the rate by the weights' norm).
    """
    own = weight_decay_of or {}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if absent := set(own) - {name.partition(".")[0] for name, _ in named}:
        raise ValueError(f"weight_decay_of names {', '.join(sorted(absent))}, which this family does not train")
    layers = {name: encoder_layer(name) if layer_decay != 1 else None for name, _ in named}
    depth = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    groups: dict[str, dict[str, Any]] = {}
    for name, p in named:
        layer, decayed, component = layers[name], decays(name, p), name.partition(".")[0]
        chosen = decayed and component in own
        label = [f"layer{layer}"] * (layer is not None) + [component] * chosen + ["weights" if decayed else "vectors"]
        group = {
            "name": ".".join(label),
            "params": [],
            "weight_decay": (own[component] if chosen else weight_decay) if decayed else 0.0,
            "lr_scale": 1.0 if layer is None else layer_decay ** (depth - layer),
            "scheduled": decayed and not chosen,
            "adapt": decayed,
        }
        groups.setdefault(group["name"], group)["params"].append(p)
    return list(groups.values())


def build_optimizer(
    kind: str,
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    weight_decay_of: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    **options: Any,
) -> Optimizer:
    """Build `lars`, `lamb`, `sgd`, `adam` or `adamw` over `param_groups`; torch's fused kernels where there are."""
    groups = param_groups(module, weight_decay=weight_decay, weight_decay_of=weight_decay_of, layer_decay=layer_decay)
    sharded = any(is_sharded(p) for group in groups for p in group["params"])
    if kind == "sgd" and sharded:  # torch fuses it for whole tensors only
        options["foreach"] = True
    elif kind not in ("lars", "lamb"):
        options["fused"] = True
    return _KINDS[kind](groups, lr, **options)


def warmup_cosine(step: int, *, total: int, warmup: int, lr: float, start_lr: float, min_lr: float) -> float:
    """Learning rate of `step` (from 0): linear from `start_lr` to `lr` in `warmup` steps, then cosine to `min_lr`.

    Step 0 takes `start_lr` when there is a warm-up, step `warmup` takes `lr`, step `total − 1` nearly `min_lr`.
    """
    if step < warmup:
        return start_lr + (lr - start_lr) * step / warmup
    return cosine(lr, min_lr, (step - warmup) / max(1, total - warmup))


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end` as `progress` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Give all groups of `param_groups` their rates for `lr`, and those that follow the schedule the decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["scheduled"]:
            group["weight_decay"] = weight_decay
