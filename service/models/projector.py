"""MLP heads between a representation and a loss."""

from __future__ import annotations

from typing import Literal

from torch import nn


def projector(
    inputs: int, hidden: int, output: int, layers: int, norm: Literal["batch", "layer"] = "batch"
) -> nn.Sequential:
    """Build (B, inputs) → (B, output): `layers` linear maps, norm and ReLU after all but the last; 0 leave as it is."""
    if layers == 0:
        return nn.Sequential()
    make_norm = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
    widths = [inputs] + [hidden] * (layers - 1)
    parts: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        parts += [nn.Linear(before, after, bias=norm != "batch"), make_norm(after), nn.ReLU(inplace=True)]
    head = nn.Sequential(*parts, nn.Linear(widths[-1], output, bias=False))
    head.fsdp_unit = True  # pyright: ignore
    return head
