"""The step on a CUDA device: no waiting for it, the CPU's numbers, the same augmentation bits."""

import numpy as np
import pytest
import torch

from jobs import recipes
from service.config import Augment, RandAugment
from service.data.augment import random_view
from service.data.draws import hash_torch, key, uniform
from service.data.plan import SamplePlan
from service.data.resident import ResidentBatches
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from service.families.base import Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def trainer(**overrides):
    settings = [f"{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    config = recipes.load("rapid", ["data.uri=none", "data.batch_size=64", *settings])
    worker = start_worker(config.compute)
    torch.manual_seed(0)
    family = place(build_family(config), worker, config.compute, config.parallel)
    return Trainer(config, worker, family, Length(10, 100, 10))


def batches(count):
    images = np.random.default_rng(0).integers(0, 256, (640, 3, 32, 32), dtype=np.uint8)
    return ResidentBatches(images, SamplePlan((640,), 64, 64, 100, 0), torch.device("cuda")).iterate(0, count, 0, 1)


DEIT3 = {
    "data__augment__randaugment__ops": 2,
    "data__augment__erase": 0.25,
    "data__augment__mixup": 0.8,
    "data__augment__cutmix": 1.0,
    "data__partitions": 32,
}
DECAYS = {"optim__layer_decay": 0.8, "optim__weight_decay_of.projector": 0.1, "schedule__weight_decay_end": 0.2}


@pytest.mark.parametrize(
    "optim, options",
    [("lars", {}), ("lamb", DECAYS), ("adam", {}), ("adamw", DECAYS), ("sgd", {}), ("adamw", DEIT3)],
    ids=["lars", "lamb", "adam", "adamw", "sgd", "deit3"],
)
def test_a_step_never_waits_for_the_device(optim, options):
    t = trainer(optim__kind=optim, optim__lr=0.1, eval__weight_ema=0.99, **options)
    stream = batches(6)
    for step in range(2):
        t.step(step, *next(stream))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 6):
            losses = t.step(step, *next(stream))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses.total)


def test_draws_are_the_cpu_bits():
    ids = torch.arange(10_000)
    assert torch.equal(hash_torch(key(1, 2), ids.cuda()).cpu(), hash_torch(key(1, 2), ids))
    assert torch.equal(uniform(key(1, 2), ids.cuda(), 7).cpu(), uniform(key(1, 2), ids, 7))


@pytest.mark.parametrize(
    "config",
    [
        Augment(blur=0.5, rotate=10),
        Augment(randaugment=RandAugment(probability=1.0), erase=0.5),
        Augment(grey=0, solarize=0, three_augment=0.9),
    ],
    ids=["blur", "randaugment", "three"],
)
def test_views_equal_the_cpu_views(config):
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    options = {"config": config, "size": 32, "seed": 1, "epoch": 2, "view": 0}
    here = random_view(images, torch.arange(16), **options)
    there = random_view(images.cuda(), torch.arange(16).cuda(), **options).cpu()
    close = (here - there).abs() < 1e-3
    assert close.float().mean() > 0.99  # a pixel at a threshold may fall on either side


def test_fp64_losses_equal_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        t = trainer(
            compute__device=device, compute__precision="fp64", family__encoder__depth=10, family__encoder__width=8
        )
        images, ids = next(batches(1))
        batch = Batch(*(None if part is None else part.to(device) for part in t._batch(images.cpu(), ids.cpu(), 0)))
        found[device] = t.module(batch).total.item()
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=1e-9)


def test_compile_gives_the_same_losses():
    images, ids = next(batches(1))
    plain, compiled = trainer(), trainer(compute__compile=True)
    a, b = (t.step(0, images, ids).total.item() for t in (plain, compiled))
    np.testing.assert_allclose(a, b, rtol=2e-2)
