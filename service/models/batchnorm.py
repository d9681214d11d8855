"""Batch norm over all ranks, on any device: torch's `SyncBatchNorm` refuses CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.collectives import all_reduce_sum, world_size
from service.precision import at_least_fp32


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics span the batches of all ranks, for (B, C) or (B, C, H, W).

    Equal to one process's batch norm over the concatenated batch, gradients included. Batches must be equal in size.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B, C) or (B, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training by the global batch, in evaluation by the running statistics."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        x = at_least_fp32(input)
        count = x.numel() // x.shape[1] * world_size()
        mean = all_reduce_sum(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance = all_reduce_sum(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def synchronise(module: nn.Module, *, cuda: bool) -> nn.Module:
    """Replace every batch norm below `module` by one over all ranks: torch's own on CUDA, ours on the CPU."""
    if cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            replacement = GlobalBatchNorm(child.num_features, child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement.to(child.weight.device, child.weight.dtype))
        else:
            synchronise(child, cuda=False)
    return module
