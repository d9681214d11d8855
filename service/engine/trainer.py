"""What a step touches and how it is taken: views, losses, gradients, the optimiser's step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from datasets_prep.errors import UserError
from service.collectives import local, total_norm
from service.config import RunConfig, canonical_partitions
from service.data.augment import draw_views, view_kinds
from service.data.draws import hash_torch, key
from service.data.mix import Mixes, draw_mixes, mix
from service.data.stream import Images
from service.engine.accumulate import backward, parts_of
from service.engine.average import WeightAverage
from service.engine.checkpoint import TrainingState
from service.engine.guard import Buffers
from service.engine.parallel import Wrapped, wrap
from service.engine.worker import Worker
from service.families.base import Batch, Family, Losses
from service.optim import build_optimizer, cosine, set_rates, warmup_cosine

_KEYS, _MIXES = 1, 2  # streams of draws: the random keys that samples get at each step, and how they are mixed


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
        try:
            size = config.slice_of(self.worker.world)
        except ValueError as error:  # of a world that the config did not foresee
            raise UserError(str(error)) from None
        self.parts = parts_of(size, config.parallel.micro_batch)
        ema = config.eval.weight_ema
        self.averaged = None if ema is None else WeightAverage(self.family.encoder, ema)
        self.wrapped = self._wrap()
        self.module = self.wrapped.module
        options = config.optim.model_dump(exclude={"kind", "clip_norm"})
        self.optimizer = build_optimizer(config.optim.kind, self.family, **options)
        self.scaler = torch.amp.GradScaler(self.worker.device.type, enabled=config.compute.precision == "fp16")
        self.state = TrainingState(self.module, self.optimizer, self.averaged, self.scaler)
        self.grad_norm = torch.zeros((), device=self.worker.device)  # of the last step, before clipping
        self.taken = True  # whether the last step was: its gradient was finite
        self._buffers = Buffers(self.module)

    def _wrap(self) -> Wrapped:
        return wrap(self.family, self.worker, self.config, self.averaged and self.averaged.module)

    @property
    def evaluated(self) -> nn.Module:
        """Encoder that is evaluated and kept, whole: the averaged one if there is one; all ranks have to ask."""
        return self.wrapped.full(self.family.encoder if self.averaged is None else self.averaged.module)

    @property
    def others(self) -> dict[str, nn.Module]:
        """Encoders trained beside it, whole, that the final report names; all ranks have to ask."""
        return {name: self.wrapped.full(module) for name, module in self.family.others.items()}

    @property
    def loss_scale(self) -> float | None:
        """Factor of fp16's loss; None in other precisions."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def step(self, step: int, images: Images, ids: Tensor) -> Losses:
        """Take optimiser step `step` (from 0) on this rank's slice of the batch; if not `taken`, nothing has changed.

        Args:
            step: number of the step.
            images: uint8, (B, 3, H, W), or (V, B, 3, S, S) of each kind of view where the reader has cut their crops.
            ids: of the samples, (B,).
        """
        set_rates(self.optimizer, self.lr(step), self.weight_decay(step))
        batch = self._batch(images, ids, step)
        self._buffers.keep()
        self.optimizer.zero_grad(set_to_none=True)
        losses = backward(
            self.module,
            self.family,
            batch,
            parts=self.parts,
            autocast=partial(self.worker.autocast, self.config.compute.precision),
            scale=self.scaler.scale,
        )
        self.taken = self._update()
        if not self.taken:
            self._buffers.put_back()
            return losses
        self.family.after_step((step + 1) / self.length.total)
        if self.averaged is not None:
            self.averaged.update(self.family.encoder)
        return losses

    def _update(self) -> bool:
        """Take the optimiser's step if the gradient is finite, which is the same on all ranks; say whether it was."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.grad_norm = total_norm(gradients)
        taken = bool(self.grad_norm.isfinite())  # waits for the device, as nothing else in a step does
        if taken:
            if (most := self.config.optim.clip_norm) is not None:
                torch._foreach_mul_(local(gradients), (most / (self.grad_norm + 1e-6)).clamp(max=1))
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return taken

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
