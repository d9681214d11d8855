"""Augmentation as the loop applies it: every option acts, and ranks change nothing."""

from dataclasses import replace

import pytest
import torch

from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from tests.families import family_config

DEIT3 = [
    "data.augment.randaugment.ops=2",
    "data.augment.erase=0.25",
    "data.augment.mixup=0.8",
    "data.augment.cutmix=1.0",
]
BATCH = 32


def batch(*changes, rank=0, world=1, step=5):
    """Views that a rank's family gets at a step."""
    config = family_config(
        "image_vicreg", f"data.batch_size={BATCH}", "data.partitions=8", "compute.precision=fp64", *changes
    )
    worker = start_worker(config.compute)
    family = place(build_family(config), worker, config.compute, config.parallel)
    trainer = Trainer(config, worker, family, Length(4, 8, 0))
    trainer.worker = replace(worker, rank=rank, world=world)
    images = torch.randint(0, 256, (BATCH, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    made = trainer._batch(images[mine], torch.arange(BATCH)[mine], step)
    return made.views if made.local is None else made.local


@pytest.mark.parametrize("option", [*DEIT3, "data.augment.three_augment=1"])
def test_each_option_acts(option):
    assert not torch.equal(batch(), batch(option))


@pytest.mark.parametrize("crops", [[], ["data.local.size=8"]], ids=["views", "local"])
def test_ranks_get_their_part_of_the_batch_of_one(crops):
    whole = batch(*DEIT3, *crops)
    assert not torch.equal(whole, batch(*crops))
    for world in (2, 4):
        parts = [batch(*DEIT3, *crops, rank=rank, world=world) for rank in range(world)]
        assert torch.equal(torch.cat(parts, 1), whole)


def test_mixes_change_with_the_step_within_an_epoch():
    assert torch.equal(batch(step=5), batch(step=6))
    assert not torch.equal(batch(*DEIT3, step=5), batch(*DEIT3, step=6))
