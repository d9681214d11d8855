"""What a real step allocates and computes on the CPU, as torch's profiler and FLOP counter see it."""

import gc
import json
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family


class Measured(NamedTuple):
    """Most bytes of tensors at once, FLOPs of a step, bytes of what a checkpoint holds, on one worker."""

    peak: int
    flops: int
    checkpoint: int


class _Unsent(DistributedDataParallel):
    """DDP that sends no weights at first: gloo's thread holds them until it has something else to do."""

    def __init__(self, *args, **options):
        super().__init__(*args, init_sync=False, **options)


def measure(config):
    """Build a trainer and take three steps on blank images: the second is steady, the third is counted for FLOPs."""
    gc.collect()  # what is freed in between would count against it
    unsent = patch("service.engine.parallel.DistributedDataParallel", _Unsent)
    with unsent, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        worker = start_worker(config.compute)
        trainer = Trainer(config, worker, place(build_family(config), worker, config.compute, config.parallel),
                          Length(1, 1, 0))  # fmt: skip
        size, side = config.slice_of(worker.world), config.data.image_size
        images, ids = torch.zeros(size, 3, side, side, dtype=torch.uint8), torch.arange(size)
        trainer.step(0, images, ids)
        trainer.step(0, images, ids)
    with FlopCounterMode(display=False) as counter:
        trainer.step(0, images, ids)
    tensors = [leaf for leaf in tree_leaves(trainer.state.plain()) if isinstance(leaf, torch.Tensor)]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Measured(_peak(profiler), counter.get_total_flops(), kept)


def _peak(profiler):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    seen = [event["args"] for event in events]
    before = seen[0]["Total Allocated"] - seen[0]["Bytes"]  # of earlier profiles in this process
    return max(each["Total Allocated"] for each in seen) - before
