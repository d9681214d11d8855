"""Steps whose gradient is not finite: not taken, told, and too many of them end the run.

The global gradient norm decides. Gradients are averaged over ranks before, so one rank's NaN is every rank's, and all
decide alike without asking one another.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn

from service.collectives import from_rank_0, rank, world_size
from service.config import RunConfig
from service.data.store import StoreUnavailable
from service.engine.alarms import cure
from service.engine.checkpoint import Checkpoints

log = logging.getLogger(__name__)

COUNT = "skipped_steps"
_SCALE_FLOOR = 1.0  # of fp16's loss; a gradient that overflows below it does so without fp16's doing


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class Buffers:
    """Copies of a module's buffers, such as batch norm's statistics, which a forward pass has changed already."""

    def __init__(self, module: nn.Module) -> None:
        buffers = [buffer.detach() for buffer in module.buffers()]
        self._groups = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        self._copies = [[torch.empty_like(buffer) for buffer in group] for group in self._groups]

    def keep(self) -> None:
        """Copy them."""
        for group, copies in zip(self._groups, self._copies, strict=True):
            torch._foreach_copy_(copies, group)

    def put_back(self) -> None:
        """Make them what they were."""
        for group, copies in zip(self._groups, self._copies, strict=True):
            torch._foreach_copy_(group, copies)


class Skips:
    """Counts the steps that were not taken, tells of them, and ends a run that has too many.

    Args:
        config: of the run, with `guard`.
        history: metrics of steps that the run has taken before, by step; the count goes on from there.
        start: step that it goes on from.
        checkpoints: of the run.
    """

    def __init__(
        self, config: RunConfig, history: Mapping[int, Mapping[str, float]], start: int, checkpoints: Checkpoints
    ) -> None:
        self._config, self._checkpoints, self._good = config, checkpoints, start
        counted = [step for step, row in history.items() if step <= start and COUNT in row]
        self.count = int(history[max(counted)][COUNT]) if counted else 0
        self._steps: list[int] = []  # of this life, as numbers of the step that was to be done

    def take(self, done: int, features: Mapping[str, Tensor], ids: Tensor, scale: float | None) -> None:
        """Judge step `done`, which was not taken; all ranks call it.

        Args:
            done: steps done, this one included.
            features: of this rank's samples, (V, B, D) of each representation.
            ids: this rank's samples, (B,).
            scale: of fp16's loss after the step; None without one.

        Raises:
            TrainingFailed: with the cure and the last good checkpoint.
        """
        if scale is not None and scale >= _SCALE_FLOOR:
            return  # fp16 looks for the largest scale that does not overflow
        self.count += 1
        self._steps.append(done)
        suspects = _suspects(features, ids)
        if rank() == 0:
            log.warning("step %d is not taken, its gradient is not finite; samples %s", done, suspects)
        reason = from_rank_0(self._verdict(done) if rank() == 0 else None)
        if reason is not None:
            raise TrainingFailed(reason)

    def _verdict(self, done: int) -> str | None:
        """Why the run ends, if it does."""
        with suppress(StoreUnavailable):
            self._good = self._checkpoints.newest_step()
        excess = self._excess(done)
        if excess is None:
            return None
        return failure(f"the gradient of step {done} is not finite ({excess})", self._config, self._checkpoints)

    def _excess(self, done: int) -> str | None:
        guard = self._config.guard
        in_a_row = next(n for n in range(1, done + 1) if done - n not in self._steps)
        since = sum(step > self._good for step in self._steps)
        if guard.nonfinite == "stop":
            return "guard.nonfinite=stop"
        if in_a_row >= guard.max_skipped_in_a_row:
            return f"{in_a_row} in a row, guard.max_skipped_in_a_row={guard.max_skipped_in_a_row}"
        if since >= guard.max_skipped:
            return f"{since} since the last checkpoint, guard.max_skipped={guard.max_skipped}"
        return None


def failure(what: str, config: RunConfig, checkpoints: Checkpoints) -> str:
    """What to tell of a run that met infinity: the cure, and what is left, a checkpoint being written included."""
    checkpoints.end()
    checkpoints.wait()
    return f"{what}: {cure('not_finite', config)}; the last good checkpoint is of step {checkpoints.newest_step()}"


def _suspects(features: Mapping[str, Tensor], ids: Tensor) -> list[int]:
    """Samples of all ranks whose representation is not finite, or all samples where each one's is."""
    bad = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for x_VBD in features.values():
        bad |= ~x_VBD.isfinite().all(-1).all(0)
    mine = ids.tolist(), ids[bad].tolist()
    ranks = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(ranks, mine)
    return [sample for _, found in ranks for sample in found] or [sample for batch, _ in ranks for sample in batch]
