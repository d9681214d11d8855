"""Traced memory and FLOPs against what a CUDA device allocates for the same step."""

import gc

import pytest
import torch

from jobs import recipes
from service.engine.footprint import footprint
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CASES = {
    "resnet": ("rapid", []),
    "vit-s": ("ijepa-vits-imagenette", []),
    "vit-s-plain": ("ijepa-vits-imagenette", ["family.encoder.attention=plain", "data.batch_size=64"]),
    "vit-s-recomputed": ("ijepa-vits-imagenette", ["family.encoder.checkpointing=true"]),
    "vit-b-accumulated": ("ijepa-vitb-imagenet", ["data.batch_size=512", "parallel.micro_batch=64"]),
    "lejepa": ("lejepa-imagenette", ["data.batch_size=64"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_device_allocates_as_much(case):
    recipe, changes = CASES[case]
    config = recipes.load(recipe, ["compute.compile=false", "compute.device=cuda", "parallel.workers=1", *changes])
    found = footprint(config, world=1, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    worker = start_worker(config.compute)
    family = place(build_family(config), worker, config.compute, config.parallel)
    trainer = Trainer(config, worker, family, Length(1, 1, 0))
    side, size = config.data.image_size, config.data.batch_size
    images = torch.zeros(size, 3, side, side, dtype=torch.uint8, device="cuda")
    ids = torch.arange(size, device="cuda")
    trainer.step(0, images, ids)  # chooses convolutions, whose trials take more, and makes the optimiser's state
    torch.cuda.reset_peak_memory_stats()
    trainer.step(0, images, ids)
    assert found.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)
