"""Two processes measure what one does: representations, gradient and weights, and raise the same alarms."""

import pytest
import torch

from service.engine.alarms import Alarms
from service.engine.monitor import Monitor
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from tests.configs import tiny
from tests.families import family_config
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed

BATCH, STEPS = 16, 4
OPTIONS = ["compute.precision=fp64", f"data.batch_size={BATCH}", "monitor.patience=1", "monitor.min_variance=1000"]
OPTIONS += ["monitor.rows=24", "monitor.max_correlation=1", "compute.threads=1"]
NO_BATCH_NORM = {"family__projector__norm": "layer", "family__encoder__norm": "group"}


def configs():
    options = dict(item.replace(".", "__").split("=") for item in OPTIONS)
    return tiny(**options, **NO_BATCH_NORM), family_config("ijepa", *OPTIONS)


def measured(config):
    """Every measurement of a few steps on random images, and the alarms after it."""
    worker = start_worker(config.compute)
    torch.manual_seed(0)
    family = place(build_family(config), worker, config.compute, config.parallel)
    trainer = Trainer(config, worker, family, Length(STEPS, STEPS, 0))
    monitor = Monitor(config, worker.rank, worker.world, 2, STEPS)
    alarms = Alarms(config, 0, {}, 0)
    side = config.data.image_size
    images = torch.randint(0, 256, (BATCH, 3, side, side), generator=torch.Generator().manual_seed(1))
    part = slice(worker.rank * BATCH // worker.world, (worker.rank + 1) * BATCH // worker.world)
    rows = []
    for step in range(STEPS):
        losses = trainer.step(step, images.to(torch.uint8)[part], torch.arange(BATCH)[part])
        monitor.collect(step + 1, losses.features)
        if monitor.due(step + 1):
            rows.append(monitor.read(trainer.module, trainer.grad_norm))
            alarms.take(step + 1, rows[-1])
    return rows, alarms.active


def all_measured():
    return [measured(config) for config in configs()]


def test_two_ranks_measure_what_one_does():
    before = torch.get_num_threads()
    whole = all_measured()
    torch.set_num_threads(before)
    ranks = on_ranks(2, all_measured)
    assert ranks[0] == ranks[1]
    for (found, alarms), (wanted, wanted_alarms) in zip(ranks[0], whole, strict=True):
        assert len(found) == len(wanted) == 2 and set(alarms) == set(wanted_alarms) == {"collapse"}
        for row, wanted_row in zip(found, wanted, strict=True):
            assert len(row) > 15 and row == pytest.approx(wanted_row, rel=1e-8)
