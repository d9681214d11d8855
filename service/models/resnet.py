"""Residual networks (He et al. 2015) with parameter names as in torchvision, so weights load either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

_BLOCKS = {8: (1, 1, 1), 20: (3, 3, 3), 10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_STEMS = {"32px": (3, 1, False), "64px": (3, 2, False), "224px": (7, 2, True)}  # kernel, stride, max-pool
Norm = Callable[[int], nn.Module]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class _Basic(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    expansion = 1
    fsdp_unit = True

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 3, stride), norm(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3), norm(planes)
        self.downsample = _shortcut(inputs, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(self.downsample(x)), inplace=True)


class _Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions beside a shortcut; the 3×3 carries the stride."""

    expansion = 4
    fsdp_unit = True

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1, self.bn1 = _conv(inputs, planes, 1), norm(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride), norm(planes)
        self.conv3, self.bn3 = _conv(planes, outputs, 1), norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)).add_(self.downsample(x)), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


class ResNet(nn.Module):
    """(B, 3, H, W) → (B, `dim`), mean-pooled over the last grid.

    Args:
        depth: 10, 18, 34 (basic blocks) or 50 (bottlenecks) in four stages; 8 or 20 in three, for small images (§4.2).
        width: channels of the first stage, doubled by each later one.
        stem: `32px` is a 3×3 convolution, `64px` one of stride 2, `224px` 7×7 of stride 2 and a max-pool.
        norm: batch norm, or group norm (32 groups or fewer) whose statistics no other sample enters.
    """

    def __init__(
        self,
        depth: int,
        width: int = 64,
        stem: Literal["32px", "64px", "224px"] = "32px",
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        make_norm: Norm = nn.BatchNorm2d if norm == "batch" else _group_norm
        block = _Bottleneck if depth >= 50 else _Basic
        kernel, stride, pool = _STEMS[stem]
        self.conv1 = _conv(3, width, kernel, stride)
        self.bn1 = make_norm(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.stages, channels = len(_BLOCKS[depth]), width
        for stage, blocks in enumerate(_BLOCKS[depth]):
            planes, layers = width * 2**stage, []
            for i in range(blocks):
                layers.append(block(channels, planes, 2 if stage and not i else 1, make_norm))
                channels = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.dim = channels
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to (B, dim)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(g for g in range(min(32, channels), 0, -1) if channels % g == 0), channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
