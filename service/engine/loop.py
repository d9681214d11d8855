"""The one training loop: the same in a plain process, under torchrun and inside a Ray Train worker.

It knows a family only as a module that turns views into losses. Nothing in a step waits for the device: metrics
are read every `tracking.log_every`, checkpoints are written in the background.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from service.collectives import from_rank_0, mean_over_ranks, world_size
from service.config import RunConfig, canonical_partitions, parse_interval
from service.data.augment import draw_views, view_kinds
from service.data.batches import open_batches
from service.data.draws import hash_torch, key
from service.data.mix import Mixes, draw_mixes, mix
from service.data.resident import ResidentBatches
from service.data.split import make_plan, open_sources, read_index
from service.data.store import Store
from service.data.stream import Images, StreamBatches
from service.engine.accumulate import backward
from service.engine.alarms import Alarms
from service.engine.average import WeightAverage
from service.engine.checkpoint import Checkpoints, TrainingState
from service.engine.lease import check_lease
from service.engine.monitor import Monitor
from service.engine.worker import Worker, distribute, place, share_buffers, start_worker
from service.evaluate.protocol import Protocol
from service.export import weights, write_encoder
from service.families import build_family
from service.families.base import Batch, Family, Losses
from service.optim import build_optimizer, cosine, set_rates, warmup_cosine
from service.tracking import stored_metrics

log = logging.getLogger(__name__)
Row = dict[str, float]
RowSink = Callable[[int, Row], None]
_KEYS, _MIXES = 1, 2  # streams of draws: the random keys that samples get at each step, and how they are mixed


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


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
        """Say whether it is due after `step` steps; steps and epochs count from 0, minutes from the last time."""
        if self.steps < math.inf:
            return step % int(self.steps) == 0
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True


@dataclass(frozen=True)
class Length:
    """Steps of a run and of its parts."""

    steps_per_epoch: int
    total: int
    warmup: int

    @staticmethod
    def of(config: RunConfig, steps_per_epoch: int) -> Length:
        """Work out a run's steps from its schedule."""
        schedule = config.schedule
        total = schedule.length(steps_per_epoch)
        return Length(steps_per_epoch, total, min(total, round(schedule.warmup_epochs * steps_per_epoch)))


@dataclass
class Trainer:
    """Everything that a step touches, built in the same way whether a run starts or resumes."""

    config: RunConfig
    worker: Worker
    family: Family
    length: Length

    def __post_init__(self) -> None:
        config = self.config
        self.module = distribute(self.family, self.worker, config.compute)
        options = config.optim.model_dump(exclude={"kind", "clip_norm"})
        self.optimizer = build_optimizer(config.optim.kind, self.family, **options)
        ema = config.eval.weight_ema
        self.averaged = None if ema is None else WeightAverage(self.family.encoder, ema)
        self.scaler = torch.amp.GradScaler(self.worker.device.type, enabled=config.compute.precision == "fp16")
        self.state = TrainingState(self.module, self.optimizer, self.averaged, self.scaler)
        self.grad_norm: Tensor | None = None  # of the last step, before clipping; none where nothing clips

    @property
    def evaluated(self) -> nn.Module:
        """Encoder that is evaluated and kept: the averaged one if there is one."""
        return self.family.encoder if self.averaged is None else self.averaged.module

    def step(self, step: int, images: Images, ids: Tensor) -> Losses:
        """Take optimiser step `step` (from 0) on this rank's slice of the batch.

        Args:
            step: number of the step.
            images: uint8, (B, 3, H, W), or (V, B, 3, S, S) of each kind of view where the reader has cut their crops.
            ids: of the samples, (B,).
        """
        set_rates(self.optimizer, self.lr(step), self.weight_decay(step))
        batch = self._batch(images, ids, step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = backward(
            self.module,
            self.family,
            batch,
            parts=self.config.parallel.accumulate,
            autocast=partial(self.worker.autocast, self.config.compute.precision),
            scale=self.scaler.scale,
        )
        if self._update():
            self.family.after_step((step + 1) / self.length.total)
            if self.averaged is not None:
                self.averaged.update(self.family.encoder)
        return losses

    def _update(self) -> bool:
        """Take the optimiser's step and say whether it was taken: fp16 skips it when a gradient overflows."""
        self.scaler.unscale_(self.optimizer)
        if self.config.optim.clip_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.optim.clip_norm)
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()  # with the next, all that fp16 waits for the device for
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        schedule, lr = self.config.schedule, self.config.optim.lr
        return warmup_cosine(
            step,
            total=self.length.total,
            warmup=self.length.warmup,
            lr=lr,
            start_lr=schedule.start_lr,
            min_lr=schedule.min_lr,
        )

    def weight_decay(self, step: int) -> float:
        """Weight decay of a step, of the components that have no own."""
        start, end = self.config.optim.weight_decay, self.config.schedule.weight_decay_end
        return start if end is None else cosine(start, end, step / self.length.total)

    def _batch(self, images: Images, ids: Tensor, step: int) -> Batch:
        """What the family takes: views, keys and masks of this rank's slice of the global batch."""
        seed, size, rank = self.config.seed, len(ids), self.worker.rank
        start, stop = rank * size, (rank + 1) * size
        kinds = self._views(images, ids, step // self.length.steps_per_epoch)
        if self.config.data.augment.mixes:
            mixes = self._mixes(step, range(start, stop), ids.device)
            kinds = [mix(views, mixes) for views in kinds]
        views, *local = map(self._format, kinds)
        keys = hash_torch(key(seed, step, _KEYS), torch.arange(start, stop, device=views.device))
        masks = self.family.draw_masks(seed, step, start, stop, step / self.length.total)
        drawn = (None, None) if masks is None else (torch.from_numpy(part).to(views.device) for part in masks)
        return Batch(views, keys, *drawn, *local)

    def _mixes(self, step: int, positions: range, device: torch.device) -> Mixes:
        data = self.config.data
        per_partition = data.batch_size // canonical_partitions(data.partitions, data.batch_size)
        alphas = {"mixup": data.augment.mixup, "cutmix": data.augment.cutmix}
        return draw_mixes(key(self.config.seed, _MIXES), step, positions, per_partition, device=device, **alphas)

    def _views(self, images: Images, ids: Tensor, epoch: int) -> list[Tensor]:
        """Augmented views, (V, B, 3, S, S) of each kind."""
        kinds = view_kinds(self.config.data, self.family.views)
        return draw_views(images, ids, kinds, seed=self.config.seed, epoch=epoch)

    def _format(self, views: Tensor) -> Tensor:
        """Views (V, B, 3, S, S) in the run's number and memory format."""
        compute = self.config.compute
        if compute.precision == "fp64":
            return views.double()
        if compute.channels_last:  # of the views as one batch, as the family encodes them
            return views.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, views.shape[:2])
        return views


def train(
    config: RunConfig, run: Run, rows: RowSink | None = None, flush: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Train, resume if the run has a checkpoint, evaluate and keep the encoder.

    Args:
        config: of the run, `data.mode` resolved or not.
        run: its storage; newer drivers fence this one off through it.
        rows: takes rank 0's metric rows.
        flush: stores the rows taken so far; called before a checkpoint is written, so that a resumed run's curves have
            no gap.

    Returns:
        The result that `result.json` holds: steps, scores, seconds.
    """
    worker = start_worker(config.compute)
    data_store = Store(config.data.uri)
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

    checkpoints = Checkpoints(run.store.sub("checkpoints"), config, worker.environment(), before_write, run.lease_epoch)
    start = checkpoints.restore(trainer.state)
    if start and worker.rank == 0:
        log.info("resumed from the checkpoint of step %d", start)
    protocol = Protocol(config, data_store, index, worker)
    report = Report(trainer, start, checkpoints, run, rows or (lambda step, row: None))
    began = time.monotonic()
    try:
        _steps(trainer, batches, start, checkpoints, protocol, run, report)
        checkpoints.wait()
    finally:
        checkpoints.end()
    seconds = time.monotonic() - began
    share_buffers(trainer.evaluated)
    scores = protocol.final(trainer.evaluated, family.others)
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
        write_encoder(kept, trainer.evaluated, config)
        kept.put("scores.json", json.dumps(scores, indent=1).encode())
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
) -> None:
    """Take the run's remaining steps; log, measure, evaluate, checkpoint and keep snapshots as the config says."""
    config, length, rank = trainer.config, trainer.length, trainer.worker.rank
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
    monitor = Monitor(config, rank, trainer.worker.world, monitor_due.steps, length.total)
    meter = Meter(start, length, config.data.batch_size)
    for step, (images, ids) in enumerate(batches.iterate(start, length.total, rank, trainer.worker.world), start):
        losses = trainer.step(step, images, ids)
        done = step + 1
        last = done == length.total
        monitor.collect(done, losses.features)
        if log_due(done) or last:
            rates = {"lr": trainer.lr(step), "weight_decay": trainer.weight_decay(step)}
            rates |= trainer.family.scheduled(done / length.total)
            row = _read_row(losses, batches.budget.used) | rates | meter.read(done)
            if trainer.scaler.is_enabled():
                row["loss_scale"] = trainer.scaler.get_scale()
            _check_finite(row["loss"], done, checkpoints)
            _check_bad_samples(row["bad_samples"], config.data.max_bad)
            report(done, row)
        if monitor.due(done):
            report(done, monitor.read(trainer.module, trainer.grad_norm))
        if eval_due(done) and not last:
            share_buffers(trainer.evaluated)
            row = protocol.validation(trainer.evaluated)
            checkpoints.score = row["val_linear"]
            report(done, row)
        if rank == 0 and (save_due(done) or last):
            _check_finite(nn.utils.get_total_norm(trainer.module.parameters()).item(), done, checkpoints)
            checkpoints.save(done, trainer.state)
        if rank == 0 and snapshot_due(done):
            run.fence()
            run.store.put(f"snapshots/step-{done:08d}.safetensors", weights(trainer.evaluated))


class Report:
    """Judges the metric rows of a run alike on all ranks; rank 0 hands them on and tells the alarms."""

    def __init__(self, trainer: Trainer, start: int, checkpoints: Checkpoints, run: Run, rows: RowSink) -> None:
        self._config, self._rank = trainer.config, trainer.worker.rank
        self._checkpoints, self._rows = checkpoints, rows
        history = from_rank_0(stored_metrics(run.store) if self._rank == 0 else {})
        self._alarms = Alarms(trainer.config, trainer.length.warmup, history, start)

    @property
    def active(self) -> dict[str, str]:
        """Alarms that last, with what was seen."""
        return self._alarms.active

    def __call__(self, step: int, row: Row) -> None:
        """Take the metrics of a step; raises when the run is to stop on what they show."""
        changed = self._alarms.take(step, row)
        if self._rank == 0:
            self._rows(step, row)
            if changed:
                self._rows(step, changed)
            for message in self._alarms.messages(step, changed):
                log.warning(message)
        if self._config.monitor.stop_on_collapse and "collapse" in self.active:
            self._stop(step)

    def _stop(self, step: int) -> None:
        self._checkpoints.wait()
        sound = self._alarms.sound_until()
        kept = [saved for saved in self._checkpoints.steps() if saved <= sound]
        last = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint from before it is kept"
        raise TrainingFailed(f"{self._alarms.message('collapse', step)}; {last}")


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


def _read_row(losses: Losses, bad_samples: int) -> Row:
    """Losses averaged, bad samples of the epoch added up over ranks; the loop's one place that waits for the device."""
    names = ["loss", *losses.terms, "bad_samples"]
    values = [losses.total.detach().double(), *(term.double() for term in losses.terms.values())]
    bad = torch.tensor(float(bad_samples), dtype=torch.float64, device=values[0].device)
    row = dict(zip(names, mean_over_ranks(torch.stack([*values, bad])).tolist(), strict=True))
    return row | {"bad_samples": round(row["bad_samples"] * world_size())}


def _check_bad_samples(found: float, most: int) -> None:
    """Stop a run whose ranks together met too many unreadable samples; each rank's own are counted by its reader."""
    if found > most:
        raise TrainingFailed(
            f"{found:g} samples of this epoch cannot be decoded, and data.max_bad={most} allows {most}: "
            "find them with 'tessera verify', shard again without them, or raise data.max_bad"
        )


def _check_finite(value: float, done: int, checkpoints: Checkpoints) -> None:
    """Stop a run whose loss or weights are no longer numbers, before that reaches a checkpoint."""
    if math.isfinite(value):
        return
    checkpoints.wait()
    raise TrainingFailed(
        f"the loss or a weight is {value} after step {done}: lower optim.lr, set optim.clip_norm=1.0 or lengthen "
        f"schedule.warmup_epochs; the last good checkpoint is of step {checkpoints.newest_step()}"
    )
