"""The only feature extractor: every evaluation of an encoder, in training or after it, goes through `extract`."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from service import watchdog
from service.config import Compute, Data
from service.data.augment import random_view, resize_normalise
from service.data.batches import sequential
from service.data.split import DataSplit
from service.engine.worker import Worker

_RAW_SIDE = 32
_VIEW_BATCH = 256


class RawPixels(nn.Module):
    """The baseline that learns nothing: the pixels themselves, averaged down to 32×32 where there are more."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten (B, 3, S, S) to (B, 3 · min(S, 32)²)."""
        return F.adaptive_avg_pool2d(x, min(x.shape[-1], _RAW_SIDE)).flatten(1)


@torch.inference_mode()
def extract(
    encoder: nn.Module, split: DataSplit, *, data: Data, compute: Compute, worker: Worker, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Encode a split; each rank encodes one contiguous slice, so every sample is encoded once on any world.

    Returns:
        Features in sample-id order, (N, D) float32, and which of them are of a readable image, (N,) bool, on the CPU of
        every rank.
    """
    bounds = [split.samples * r // worker.world for r in range(worker.world + 1)]
    start, stop = bounds[worker.rank], bounds[worker.rank + 1]
    training = encoder.training
    encoder.eval()
    parts: list[Tensor] = []
    for images, readable in sequential(split, data, start, stop, batch_size):
        watchdog.beat()
        x = resize_normalise(images.to(worker.device), data.eval_image_size)
        features = _encode(encoder, x, compute, worker)
        parts.append(torch.cat([features, readable[:, None].float()], 1))
    encoder.train(training)
    gathered = _gather(torch.cat(parts), [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)], worker)
    return gathered[:, :-1].contiguous(), gathered[:, -1] > 0


@torch.inference_mode()
def extract_views(
    encoder: nn.Module, split: DataSplit, *, data: Data, compute: Compute, worker: Worker, samples: int, views: int
) -> Tensor:
    """Encode augmented views of a split's first samples; every rank encodes all.

    Returns:
        Features of the readable ones, (V, N, D) float32, on the CPU.
    """
    training = encoder.training
    encoder.eval()
    parts: list[Tensor] = []
    first = 0
    for images, readable in sequential(split, data, 0, min(samples, split.samples), _VIEW_BATCH):
        watchdog.beat()
        ids = torch.arange(first, first + len(images), device=worker.device)
        first += len(images)
        options = {"config": data.augment, "size": data.eval_image_size, "seed": 0, "epoch": 0}
        drawn = [random_view(images.to(worker.device), ids, view=v, **options) for v in range(views)]
        parts.append(torch.stack([_encode(encoder, x, compute, worker) for x in drawn])[:, readable])
    encoder.train(training)
    return torch.cat(parts, 1)


def _encode(encoder: nn.Module, x: Tensor, compute: Compute, worker: Worker) -> Tensor:
    x = x.double() if compute.precision == "fp64" else x
    if compute.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with worker.autocast(compute.precision):
        return encoder(x).float().cpu()


def _gather(features: Tensor, counts: list[int], worker: Worker) -> Tensor:
    if worker.world == 1:
        return features
    padded = F.pad(features, (0, 0, 0, max(counts) - len(features))).to(worker.device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).cpu()
