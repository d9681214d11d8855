"""One process, two under DDP and two with shards take the same steps; so do shards over all and over each host."""

import pytest
import torch

from service.collectives import rank
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from service.models.vit import SIZES
from tests.families import GROUP, family_config
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed

BATCH, STEPS = 8, 50
TINY = [
    f"data.batch_size={BATCH}",
    f"schedule.steps={STEPS}",
    "compute.precision=fp64",
    "compute.threads=1",
    "compute.channels_last=false",
    "optim.clip_norm=0.5",
    "eval.weight_ema=0.9",
]
CHECKPOINTING = "family.encoder.checkpointing=true"
RESNET = ["family.encoder.depth=8", "family.encoder.width=4"]
CASES = {
    "resnet-lars": ("image_vicreg", ["optim.kind=lars", *RESNET, "parallel.micro_batch=2", *GROUP]),
    "resnet-adamw": ("image_vicreg", ["optim.kind=adamw", *RESNET, "parallel.sync_batchnorm=true"]),
    "vit-lamb": ("image_vicreg", ["optim.kind=lamb", "family.encoder.kind=vit", CHECKPOINTING, GROUP[1]]),
    "ijepa": ("ijepa", ["optim.kind=adamw", "family.encoder.drop_path=0.2", CHECKPOINTING, "parallel.micro_batch=4"]),
    "hjepa": ("hjepa", ["optim.kind=sgd", "family.encoder.depth=2", "parallel.micro_batch=2"]),
}


def make_trainer(config):
    SIZES["tiny"] = {"embed_dim": 24, "depth": 2, "num_heads": 2}  # in this process alone
    worker = start_worker(config.compute)
    torch.manual_seed(0)
    family = place(build_family(config), worker, config.compute, config.parallel)
    return Trainer(config, worker, family, Length(STEPS, STEPS, 0))


def images_of(trainer, step):
    """This rank's slice of a step's random images, and its ids."""
    side, size = trainer.config.data.image_size, BATCH // trainer.worker.world
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=generator)
    mine = slice(rank() * size, (rank() + 1) * size)
    return images[mine], torch.arange(BATCH)[mine]


def trained(kind, changes, steps=STEPS):
    """Losses and gradient norms of every step, and all weights at the end, whole."""
    trainer = make_trainer(family_config(kind, *TINY, *changes))
    rows = []
    for step in range(steps):
        losses = trainer.step(step, *images_of(trainer, step))
        rows.append((losses.total.item(), trainer.grad_norm.item()))
    weights = {"evaluated": trainer.evaluated, "encoder": trainer.wrapped.full(trainer.family.encoder)}
    state = {f"{k}.{n}": p.detach() for k, m in (weights | trainer.others).items() for n, p in m.named_parameters()}
    return rows, state


def assert_equal_runs(found, wanted, tolerance=1e-9):
    for (rows, weights), (wanted_rows, wanted_weights) in zip(found, wanted, strict=True):
        rows, wanted_rows = (torch.tensor(each, dtype=torch.float64) for each in (rows, wanted_rows))
        torch.testing.assert_close(rows, wanted_rows, rtol=tolerance, atol=0)
        for name, weight in wanted_weights.items():
            assert (weights[name] - weight).norm() <= tolerance * weight.norm(), name


def mean_of(ranks):
    """The runs of one of the ranks with the means of their losses: gradients and weights are equal on all."""
    for rows, weights in ranks[1:]:
        assert [norm for _, norm in rows] == [norm for _, norm in ranks[0][0]]
        assert all(torch.equal(weight, ranks[0][1][name]) for name, weight in weights.items())
    losses = torch.tensor([[loss for loss, _ in rows] for rows, _ in ranks], dtype=torch.float64).mean(0).tolist()
    return [(loss, norm) for loss, (_, norm) in zip(losses, ranks[0][0], strict=True)], ranks[0][1]


@pytest.mark.parametrize("case", CASES)
def test_ddp_and_shards_take_the_steps_of_one_process(case):
    kind, changes = CASES[case]
    (alone,) = on_ranks(1, trained, kind, changes)
    for spread in ("ddp", "fsdp"):
        together = mean_of(on_ranks(2, trained, kind, [*changes, f"parallel.kind={spread}"]))
        assert_equal_runs([together], [alone])
