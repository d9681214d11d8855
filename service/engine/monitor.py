"""Representations measured during training: bounded rows, the same on any number of ranks, nothing in other steps."""

from __future__ import annotations

import logging
import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from service.collectives import all_reduce_sum, total_norm
from service.config import RunConfig
from service.evaluate import quality
from service.precision import at_least_fp32

log = logging.getLogger(__name__)
Row = dict[str, float]


class Monitor:
    """Collects embeddings of the last steps before a measurement, evenly from the global batch, and measures them.

    Args:
        config: of the run.
        rank: of this process; it holds an equal part of each global batch, in rank order.
        world: number of processes.
        every: steps between measurements; infinite for none.
        total: steps of the run; the last is measured too.
    """

    def __init__(self, config: RunConfig, rank: int, world: int, every: float, total: int) -> None:
        self._rows, self._batch = config.monitor.rows, config.data.batch_size
        self._every, self._total = every, total
        self._size = self._batch // world
        self._start = rank * self._size
        self._steps = 0 if every == math.inf else min(int(every), total, -(-self._rows // self._batch))
        self._window: dict[str, list[Tensor]] = defaultdict(list)

    def due(self, done: int) -> bool:
        """Whether to measure after `done` steps."""
        return self._steps > 0 and self._next(done) == done

    def _next(self, done: int) -> int:
        return min(self._total, -(-done // int(self._every)) * int(self._every))

    def collect(self, done: int, features: dict[str, Tensor]) -> None:
        """Keep what a measurement takes of step `done`, (V, B, D) of each representation; waits for nothing."""
        if self._steps == 0 or self._next(done) - done >= self._steps:
            return
        for name, x_VBD in features.items():
            self._window[name].append(self._chosen(x_VBD))

    def _chosen(self, x_VBD: Tensor) -> Tensor:
        """Embeddings at evenly spaced positions of the global batch, (V, n, D); those of other ranks are zero."""
        n = max(1, min(self._batch, self._rows // (self._steps * len(x_VBD))))
        positions = [i * self._batch // n - self._start for i in range(n)]
        mine = [i for i, at in enumerate(positions) if 0 <= at < self._size]
        x_VBD = at_least_fp32(x_VBD.detach())
        chosen = x_VBD.new_zeros(len(x_VBD), n, x_VBD.shape[-1])
        if mine:
            at = torch.tensor([positions[i] for i in mine], device=x_VBD.device)
            chosen[:, mine[0] : mine[-1] + 1] = x_VBD.index_select(1, at)
        return chosen

    @torch.no_grad()
    def read(self, module: nn.Module, grad_norm: Tensor) -> Row:
        """Measure what was collected; all ranks take part and get the same.

        A window that a restart has cut short measures nothing: rank grows with the number of rows.

        Args:
            module: whose trained weights are measured too.
            grad_norm: global norm of the gradient before it was clipped.
        """
        window, self._window = self._window, defaultdict(list)
        row: Row = {}
        for name, parts in window.items():
            if len(parts) == self._steps:
                x_VND = all_reduce_sum(torch.cat(parts, 1))
                row |= {f"monitor/{name}/{metric}": value for metric, value in quality.report(x_VND).items()}
        weight_norm = total_norm(p for p in module.parameters() if p.requires_grad)
        norms = torch.stack([grad_norm.double(), weight_norm.double()])
        return row | dict(zip(("monitor/grad_norm", "monitor/weight_norm"), norms.tolist(), strict=True))
