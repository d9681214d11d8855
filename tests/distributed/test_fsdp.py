"""One process, two under DDP and two with shards take the same steps; so do shards over all and over each host."""

import os
from contextlib import suppress
from itertools import count

import pytest
import torch
from safetensors.torch import load
from torch._dynamo.utils import counters

from datasets_prep.errors import UserError
from service.collectives import local, rank
from service.data.store import Store
from service.engine.loop import Interrupted, Run, train
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from service.models.vit import SIZES
from tests.configs import tiny
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
    """Losses and gradient norms of every step; all weights at the end, whole; share of the state that this rank has."""
    trainer = make_trainer(family_config(kind, *TINY, *changes))
    rows = []
    for step in range(steps):
        losses = trainer.step(step, *images_of(trainer, step))
        rows.append((losses.total.item(), trainer.grad_norm.item()))
    weights = {"evaluated": trainer.evaluated, "encoder": trainer.wrapped.full(trainer.family.encoder)}
    state = {f"{k}.{n}": p.detach() for k, m in (weights | trainer.others).items() for n, p in m.named_parameters()}
    kept = [t for s in trainer.optimizer.state.values() for t in s.values() if t.ndim]
    kept += [*trainer.family.parameters(), *trainer.averaged.parameters()]
    return rows, state, sum(t.numel() for t in local(kept)) / sum(t.numel() for t in kept)


def assert_equal_runs(found, wanted, tolerance=1e-9):
    rows, wanted_rows = (torch.tensor(rows, dtype=torch.float64) for rows, *_ in (found, wanted))
    torch.testing.assert_close(rows, wanted_rows, rtol=tolerance, atol=0)
    for name, weight in wanted[1].items():
        assert (found[1][name] - weight).norm() <= tolerance * weight.norm(), name


def mean_of(ranks):
    """The runs of one of the ranks with the means of their losses: gradients and weights are equal on all."""
    for rows, weights, _ in ranks[1:]:
        assert [norm for _, norm in rows] == [norm for _, norm in ranks[0][0]]
        assert all(torch.equal(weight, ranks[0][1][name]) for name, weight in weights.items())
    losses = torch.tensor([[loss for loss, _ in rows] for rows, *_ in ranks], dtype=torch.float64).mean(0).tolist()
    return [(loss, norm) for loss, (_, norm) in zip(losses, ranks[0][0], strict=True)], ranks[0][1]


@pytest.mark.parametrize("case", CASES)
def test_ddp_and_shards_take_the_steps_of_one_process(case):
    kind, changes = CASES[case]
    (alone,) = on_ranks(1, trained, kind, changes)
    for spread in ("ddp", "fsdp"):
        together = mean_of(on_ranks(2, trained, kind, [*changes, f"parallel.kind={spread}"]))
        assert_equal_runs(together, alone)


IJEPA = ("ijepa", ["optim.kind=adamw", "family.encoder.depth=1", "family.predictor.depth=1"])


def test_shards_over_each_host_take_the_same_steps_and_hold_more():
    kind, changes = IJEPA
    (alone,) = on_ranks(1, trained, kind, changes, 5)
    for shard, copies in (("all", 1), ("host", 2)):
        spread = [*changes, "parallel.kind=fsdp", f"parallel.shard={shard}"]
        ranks = on_ranks(4, trained, kind, spread, 5, hosts=2)
        assert_equal_runs(mean_of(ranks), alone)
        shares = [share for *_, share in ranks]
        assert sum(shares) == pytest.approx(copies) and max(shares) < 1.25 * copies / 4


def uneven_hosts(changes):
    """What is said where one host has another number of workers than the other."""
    os.environ["LOCAL_WORLD_SIZE"] = "1" if rank() == 2 else "2"
    with pytest.raises(UserError) as error:
        make_trainer(family_config(IJEPA[0], *TINY, *changes))
    return str(error.value)


def test_hosts_with_unequal_numbers_of_workers_are_refused():
    changes = ["data.batch_size=6", "parallel.kind=fsdp", "parallel.shard=host"]
    for message in on_ranks(3, uneven_hosts, changes):
        assert message.startswith("parallel.shard=host needs as many workers on each host, and they have [1, 2]")


def exchanges(kind, changes):
    """Collectives that reduce something during a step."""
    trainer = make_trainer(family_config(kind, *TINY, *changes))
    trainer.step(0, *images_of(trainer, 0))
    with torch.profiler.profile() as profile:
        trainer.step(1, *images_of(trainer, 1))
    return sum(e.count for e in profile.key_averages() if e.key.startswith("c10d::") and "reduce" in e.key)


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step_in_however_many_micro_batches(spread):
    kind, changes = IJEPA
    changes = [*changes, f"parallel.kind={spread}"]
    whole, cut = (on_ranks(2, exchanges, kind, [*changes, f"parallel.micro_batch={size}"])[0] for size in (4, 2))
    assert cut == whole > 0


def test_the_mean_over_ranks_is_no_sum_in_fp32():
    kind, changes = CASES["resnet-lars"]
    changes = [*changes, "compute.precision=fp32", "compute.channels_last=true"]
    (alone,) = on_ranks(1, trained, kind, changes, 3)
    for world in (2, 4):
        assert_equal_runs(mean_of(on_ranks(world, trained, kind, [*changes, "parallel.kind=fsdp"], 3)), alone, 1e-3)


def overflown(kind, changes):
    """Whether a step is taken whose gradient overflows in one rank's shard, and fp16's scale before and after."""
    trainer = make_trainer(family_config(kind, *TINY, *changes))
    losses = trainer.module(trainer._batch(*images_of(trainer, 0), 0))
    trainer.scaler.scale(losses.total).backward()
    shards = local(p.grad for p in trainer.family.parameters() if p.grad is not None)
    if rank() == 1:
        next(shard for shard in shards if shard.numel()).fill_(torch.inf)
    before = trainer.scaler.get_scale()
    return trainer._update(), before, trainer.scaler.get_scale()


def test_all_ranks_lower_the_scale_when_one_shard_overflows():
    kind, changes = IJEPA
    ranks = on_ranks(2, overflown, kind, [*changes, "parallel.kind=fsdp", "compute.precision=fp16"])
    assert ranks == [(False, 2.0**16, 2.0**15)] * 2


def compiled(kind, changes):
    """Three steps and the number of graphs, by a backend that changes nothing."""
    torch.nn.Module.compile = lambda self: setattr(
        self, "_compiled_call_impl", torch.compile(self._call_impl, backend="eager")
    )
    return trained(kind, changes, 3), counters["stats"]["unique_graphs"]


def test_blocks_in_shards_are_compiled_one_by_one():
    kind, changes = IJEPA
    changes = [*changes, "parallel.kind=fsdp"]
    (plain, none), (found, graphs) = (
        on_ranks(2, compiled, kind, [*changes, f"compute.compile={whether}"])[0] for whether in ("false", "true")
    )
    assert_equal_runs(found, plain)
    assert none == 0 and graphs > 1


RUN = {
    **{name.replace(".", "__"): value for name, value in (each.split("=") for each in [*RESNET, *GROUP])},
    "data__batch_size": 16,
    "schedule__steps": 6,
    "schedule__warmup_epochs": 0,
    "compute__precision": "fp64",
    "compute__threads": 1,
    "eval__weight_ema": 0.5,
    "eval__every": "2 steps",
    "checkpoint__snapshot_every": "4 steps",
}


def part_of_a_run(folder, data, changes, stop_after=None):
    """Losses and validation scores by step, and the result of a run that ends or is stopped."""
    rows, taken = {}, count(1)

    def take(step, row):
        rows.setdefault(step, {}).update({k: v for k, v in row.items() if k in ("loss", "val_linear")})

    with suppress(Interrupted):
        stop = lambda: next(taken) == stop_after  # noqa: E731
        return rows, train(tiny(data, **RUN | changes), Run(Store(folder)), take, stop_requested=stop)
    return rows, None


def test_a_run_that_changes_workers_and_kind_ends_as_the_undisturbed_one(few_digits, tmp_path):
    (whole, wanted), *_ = on_ranks(1, part_of_a_run, tmp_path / "whole", few_digits, {})
    rows = {}
    for world, kind, stop_after in ((4, "fsdp", 1), (2, "ddp", 2), (2, "fsdp", None)):
        changes = {"parallel__kind": kind, "parallel__micro_batch": 4}
        (some, result), *_ = on_ranks(world, part_of_a_run, tmp_path / "moved", few_digits, changes, stop_after)
        assert min(some) == len(rows) + 1  # a flag counts a step after it was raised
        rows |= some
    assert result["resumed_from"] == 5
    for step in range(1, 7):
        assert rows[step] == pytest.approx(whole[step], rel=1e-9), step
    assert result["scores"]["trained"] == pytest.approx(wanted["scores"]["trained"], rel=1e-6)
    for name in ("encoder/model.safetensors", "snapshots/step-00000004.safetensors"):
        found, expected = (load(Store(tmp_path / run).get(name)) for run in ("moved", "whole"))
        for each, weight in expected.items():
            torch.testing.assert_close(found[each], weight, rtol=1e-7, atol=1e-10)


def test_a_run_in_shards_goes_on_bitwise(few_digits, tmp_path):
    changes = {"parallel__kind": "fsdp", "compute__deterministic": "true", "compute__precision": "fp32"}
    (whole, wanted), *_ = on_ranks(2, part_of_a_run, tmp_path / "whole", few_digits, changes)
    (before, _), *_ = on_ranks(2, part_of_a_run, tmp_path / "cut", few_digits, changes, 2)
    (after, result), *_ = on_ranks(2, part_of_a_run, tmp_path / "cut", few_digits, changes)
    assert result["resumed_from"] == 3 and before | after == whole
    assert result["scores"] == wanted["scores"]
