"""The one training loop: the same in a plain process, under torchrun and inside a Ray Train worker.

It knows a family only as a module that turns views into losses. A step waits for the device once, for the norm of its
gradient (guard.py); metrics are read every `tracking.log_every`, checkpoints are written in the background.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.collectives import from_rank_0, mean_over_ranks, total_norm, world_size
from service.config import RunConfig, parse_interval
from service.data.batches import open_batches
from service.data.resident import ResidentBatches
from service.data.split import make_plan, open_sources, read_index
from service.data.store import Store
from service.data.stream import StreamBatches
from service.engine.alarms import Alarms
from service.engine.checkpoint import Checkpoints
from service.engine.control import Control
from service.engine.goodput import FINISHED, Clock, Leg, goodput, read_events
from service.engine.guard import COUNT, Skips, TrainingFailed, failure
from service.engine.lease import check_lease
from service.engine.monitor import Monitor
from service.engine.parallel import place, share_buffers
from service.engine.trainer import Length, Trainer
from service.engine.worker import Worker, start_worker
from service.evaluate.protocol import Protocol
from service.export import weights, write_encoder
from service.families import build_family
from service.families.base import Losses
from service.tracking import stored_metrics

log = logging.getLogger(__name__)
Row = dict[str, float]
RowSink = Callable[[int, Row], None]


class Interrupted(RuntimeError):
    """Training was asked to stop; the message says what the run goes on from."""


@dataclass(frozen=True)
class Run:
    """Where a run writes, and the lease epoch under which it may."""

    store: Store
    lease_epoch: int = 0

    def fence(self) -> None:
        """Raise when another driver has taken the run over."""
        check_lease(self.store, self.lease_epoch)


class Every:
    """Tells when an interval such as '10 steps', '5 epochs' or '2 minutes' has passed."""

    def __init__(self, interval: str | None, steps_per_epoch: int) -> None:
        self.steps, self.seconds = math.inf, math.inf
        if interval is not None:
            amount, unit = parse_interval(interval)
            if unit == "minutes":
                self.seconds = amount * 60
            else:
                self.steps = max(1, round(amount * (steps_per_epoch if unit == "epochs" else 1)))
        self._last = time.monotonic()

    def __call__(self, step: int) -> bool:
        """Say whether it is due after `step` steps, which and epochs count from 0; an interval in minutes never is."""
        return self.steps < math.inf and step % int(self.steps) == 0

    def elapsed(self) -> bool:
        """Say whether an interval in minutes has passed since the last time, by this process's clock."""
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True


def train(
    config: RunConfig,
    run: Run,
    rows: RowSink | None = None,
    flush: Callable[[], object] = lambda: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, resume if the run has a checkpoint, evaluate and keep the encoder.

    Args:
        config: of the run, `data.mode` resolved or not.
        run: its storage; newer drivers fence this one off through it.
        rows: takes rank 0's metric rows.
        flush: stores the rows taken so far; called before a checkpoint is written, so that a resumed run's curves have
            no gap.
        stop_requested: asked after each step on every rank; when one says yes, all stop at the same step.

    Returns:
        The result that `result.json` holds: steps, scores, seconds.

    Raises:
        Interrupted: `stop_requested` said yes; with `checkpoint.on_stop` the steps taken are committed.
        TrainingFailed: training cannot go on.
    """
    clock = Clock()
    worker = start_worker(config.compute)
    facts = {"lease": run.lease_epoch, "host": socket.gethostname(), "pid": os.getpid(), "world": worker.world}
    leg = Leg(run.store if worker.rank == 0 else None, clock, **facts)
    try:
        result = _train(config, run, worker, leg, rows or (lambda step, row: None), flush, stop_requested)
    except BaseException as error:
        leg.close(type(error).__name__)
        raise
    return result


def _train(
    config: RunConfig,
    run: Run,
    worker: Worker,
    leg: Leg,
    rows: RowSink,
    flush: Callable[[], object],
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    data_store = Store(config.data.uri, 60 * config.data.deadline_minutes)
    index = read_index(data_store)
    sources = open_sources(config.data)
    plan = make_plan(sources, config.data, config.seed)
    torch.manual_seed(config.seed)
    family = place(build_family(config), worker, config.compute, config.parallel)
    batches = open_batches(
        sources,
        plan,
        config.data,
        views=family.views,
        seed=config.seed,
        device=worker.device,
        hosts=worker.hosts,
    )
    trainer = Trainer(config, worker, family, Length.of(config, plan.steps_per_epoch))

    def before_write() -> None:
        flush()
        run.fence()

    checkpoints = Checkpoints(
        run.store.sub("checkpoints"), config, worker.environment(), before_write, run.lease_epoch, leg.committed
    )
    with leg.clock.phase("restore"):
        start = checkpoints.restore(trainer.state)
    leg.restored(start)
    if start and worker.rank == 0:
        log.info("resumed from the checkpoint of step %d", start)
    protocol = Protocol(config, data_store, index, worker)
    history = from_rank_0(stored_metrics(run.store) if worker.rank == 0 else {})
    report = Report(trainer, start, checkpoints, history, rows)
    began = time.monotonic()
    try:
        _steps(trainer, batches, start, checkpoints, protocol, run, report, leg, stop_requested)
        with leg.clock.phase("checkpoint"):
            checkpoints.wait()
    finally:
        checkpoints.end()
    seconds = time.monotonic() - began
    leg.clock.enter("evaluate")
    encoder = trainer.evaluated
    share_buffers(encoder)
    scores = protocol.final(encoder, trainer.others) if config.eval.report else protocol.validation(encoder)
    result = {
        "steps": trainer.length.total,
        "resumed_from": start,
        "train_seconds": seconds,
        "alarms": report.active,
        **scores,
    }
    if worker.rank == 0:
        run.fence()
        kept = run.store.sub("encoder")
        write_encoder(kept, encoder, config)
        kept.put("scores.json", json.dumps(scores, indent=1).encode())
        rows(trainer.length.total, {name: scores[name] for name in ("val_linear", "val_linear_se")})
        leg.close(FINISHED)
        found = goodput(read_events(run.store))
        rows(trainer.length.total, found.metrics())
        result["goodput"] = found.plain()
        run.store.put("result.json", json.dumps(result, indent=1).encode())
    return result


def _steps(
    trainer: Trainer,
    batches: ResidentBatches | StreamBatches,
    start: int,
    checkpoints: Checkpoints,
    protocol: Protocol,
    run: Run,
    report: Report,
    leg: Leg,
    stop_requested: Callable[[], bool],
) -> None:
    """Take the run's remaining steps; log, measure, evaluate, checkpoint and keep snapshots as the config says."""
    config, length, worker = trainer.config, trainer.length, trainer.worker
    log_due, eval_due, save_due, snapshot_due, monitor_due = (
        Every(interval, length.steps_per_epoch)
        for interval in (
            config.tracking.log_every,
            config.eval.every,
            config.checkpoint.every,
            config.checkpoint.snapshot_every,
            config.monitor.every,
        )
    )
    monitor = Monitor(config, worker.rank, worker.world, monitor_due.steps, length.total)
    control = Control("save", "late", "snapshot", "stop")
    meter = Meter(start, length, config.data.batch_size)
    on_stop, unsaved = config.checkpoint.on_stop, False
    timed = leg.clock.steps(batches.iterate(start, length.total, worker.rank, worker.world))
    for step, (images, ids) in enumerate(timed, start):
        losses = trainer.step(step, images, ids)
        done = step + 1
        last = done == length.total
        leg.done(done)
        if trainer.taken:
            monitor.collect(done, losses.features)
        else:
            report.skipped(done, losses, ids)
        if log_due(done) or last:
            report(done, _row(trainer, done, losses, batches.budget.used) | meter.read(done))
        with leg.clock.phase("evaluate"):
            if monitor.due(done):
                report(done, monitor.read(trainer.module, trainer.grad_norm))
            if eval_due(done) and not last:
                report(done, _validate(trainer, protocol, checkpoints))
        agreed = control(
            save=worker.rank == 0 and save_due.elapsed(),
            late=checkpoints.late(),
            snapshot=worker.rank == 0 and snapshot_due.elapsed(),
            stop=stop_requested(),
        )
        unsaved |= save_due(done) or "save" in agreed
        if last or (unsaved and "late" not in agreed) or (on_stop and "stop" in agreed):
            with leg.saving(done):
                _save(done, trainer, checkpoints)
            unsaved = False
        if snapshot_due(done) or "snapshot" in agreed:
            _keep_snapshot(trainer, run, done)
        if "stop" in agreed:
            _interrupt(done, length, checkpoints)


def _validate(trainer: Trainer, protocol: Protocol, checkpoints: Checkpoints) -> Row:
    """Probe the encoder on the validation split."""
    encoder = trainer.evaluated
    share_buffers(encoder)
    row = protocol.validation(encoder)
    checkpoints.score = row["val_linear"]
    return row


def _keep_snapshot(trainer: Trainer, run: Run, done: int) -> None:
    evaluated = trainer.evaluated
    if trainer.worker.rank == 0:
        run.fence()
        run.store.put(f"snapshots/step-{done:08d}.safetensors", weights(evaluated))


def _interrupt(done: int, length: Length, checkpoints: Checkpoints) -> None:
    checkpoints.settle()
    raise Interrupted(f"stopped after step {done} of {length.total}; the same command goes on from its checkpoint")


def _save(done: int, trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Begin a checkpoint, unless infinity would get into it."""
    if not total_norm(trainer.module.parameters()).isfinite():
        raise TrainingFailed(failure(f"a weight is not finite after step {done}", trainer.config, checkpoints))
    checkpoints.save(done, trainer.state)


class Report:
    """Judges the metric rows of a run alike on all ranks; rank 0 hands them on and tells the alarms."""

    def __init__(
        self, trainer: Trainer, start: int, checkpoints: Checkpoints, history: dict[int, Row], rows: RowSink
    ) -> None:
        self._config, self._rank, self._trainer = trainer.config, trainer.worker.rank, trainer
        self._checkpoints, self._rows = checkpoints, rows
        self._alarms = Alarms(trainer.config, trainer.length.warmup, history, start)
        self._skips = Skips(trainer.config, history, start, checkpoints)

    @property
    def active(self) -> dict[str, str]:
        """Alarms that last, with what was seen."""
        return self._alarms.active

    def __call__(self, step: int, row: Row) -> None:
        """Take the metrics of a step; raises when the run is to stop on what they show."""
        if "loss" in row:
            row[COUNT] = self._skips.count
        changed = self._alarms.take(step, row)
        if self._rank == 0:
            self._rows(step, row)
            if changed:
                self._rows(step, changed)
            for message in self._alarms.messages(step, changed):
                log.warning(message)
        self._check(step, row)
        fatal = {"collapse": self._config.monitor.stop_on_collapse, "spike": self._config.guard.spike == "stop"}
        for alarm in self.active:
            if fatal.get(alarm):
                self._stop(alarm, step)

    def skipped(self, step: int, losses: Losses, ids: Tensor) -> None:
        """Take note that a step was not taken; raises when the run is to stop."""
        self._skips.take(step, losses.features, ids, self._trainer.loss_scale)

    def _check(self, step: int, row: Row) -> None:
        _check_bad_samples(row.get("bad_samples", 0), self._config.data.max_bad)
        loss = row.get("loss", 0.0)
        if self._trainer.taken and not math.isfinite(loss):
            raise TrainingFailed(failure(f"the loss is {loss} after step {step}", self._config, self._checkpoints))

    def _stop(self, alarm: str, step: int) -> None:
        self._checkpoints.wait()
        sound = self._alarms.sound_until(alarm)
        kept = [saved for saved in self._checkpoints.steps() if saved <= sound]
        last = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint from before it is kept"
        raise TrainingFailed(f"{self._alarms.message(alarm, step)}; {last}")


class Meter:
    """Progress and throughput since the last reading."""

    def __init__(self, start: int, length: Length, batch_size: int) -> None:
        self._length, self._batch = length, batch_size
        self._step, self._time = start, time.monotonic()

    def read(self, done: int) -> Row:
        """Epoch, images a second over all ranks and remaining seconds, after `done` steps."""
        now = time.monotonic()
        rate = (done - self._step) / max(1e-9, now - self._time)
        self._step, self._time = done, now
        remaining = (self._length.total - done) / max(rate, 1e-9)
        epoch = done / self._length.steps_per_epoch
        return {"epoch": epoch, "images_per_s": rate * self._batch, "eta_s": remaining}


def _row(trainer: Trainer, done: int, losses: Losses, bad_samples: int) -> Row:
    """Losses averaged, bad samples of the epoch added up over ranks, and the rates of the step just taken."""
    names = ["loss", *losses.terms, "bad_samples"]
    values = [losses.total.detach().double(), *(term.double() for term in losses.terms.values())]
    bad = torch.tensor(float(bad_samples), dtype=torch.float64, device=values[0].device)
    row = dict(zip(names, mean_over_ranks(torch.stack([*values, bad])).tolist(), strict=True))
    row["bad_samples"] = round(row["bad_samples"] * world_size())
    row |= {"lr": trainer.lr(done - 1), "weight_decay": trainer.weight_decay(done - 1)}
    row |= trainer.family.scheduled(done / trainer.length.total)
    return row if trainer.loss_scale is None else row | {"loss_scale": trainer.loss_scale}


def _check_bad_samples(found: float, most: int) -> None:
    """Stop a run whose ranks together met too many unreadable samples; each rank's own are counted by its reader."""
    if found > most:
        raise TrainingFailed(
            f"{found:g} samples of this epoch cannot be decoded, and data.max_bad={most} allows {most}: "
            "find them with 'tessera verify', shard again without them, or raise data.max_bad"
        )
