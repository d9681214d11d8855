"""Two processes with half the batch each are one process with the whole: losses, gradients, statistics."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from service.collectives import rank, world_size
from service.engine.accumulate import backward
from service.models.batchnorm import GlobalBatchNorm, synchronise
from tests.families import ACCUMULATED, MANY_VIEWS, VIEW_LOSSES, family_config, make_family, random_batch
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed
BATCH = 16


def family_and_batch(kind, changes, dtype):
    config = family_config(kind, *changes)
    family = make_family(config, dtype)
    return family, random_batch(family, config, BATCH, dtype)


def losses_and_gradients(module, batch):
    losses = module(batch)
    losses.total.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in module.named_parameters() if p.requires_grad}
    return losses.total.detach(), losses.terms, gradients


def on_this_rank(kind, changes, dtype):
    family, batch = family_and_batch(kind, changes, dtype)
    module = DistributedDataParallel(synchronise(family, cuda=False))
    return losses_and_gradients(module, batch.split(world_size())[rank()])


def each_on_this_rank(settings):
    return [on_this_rank(*each) for each in settings]


def check(world, kind, changes, dtype, tolerance, shared=()):
    compare(on_ranks(world, on_this_rank, kind, changes, dtype), kind, changes, dtype, tolerance, shared)


def compare(ranks, kind, changes, dtype, tolerance, shared=()):
    total, terms, gradients = losses_and_gradients(*family_and_batch(kind, changes, dtype))
    mean = torch.stack([r[0] for r in ranks]).mean()
    torch.testing.assert_close(mean, total, rtol=tolerance, atol=0)
    for name in shared:
        for found in ranks:
            torch.testing.assert_close(found[1][name], terms[name], rtol=tolerance, atol=0)
    scale = torch.stack([g.norm() for g in gradients.values()]).max()
    for name, gradient in gradients.items():
        error = (ranks[0][2][name] - gradient).norm() / scale
        assert error < tolerance, name
        assert torch.equal(ranks[0][2][name], ranks[1][2][name])
    assert scale > 0


def resnet(output):
    return [f"family.projector.output={output}"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("output", [8, 32], ids=["moments", "gathered"])
def test_resnet_with_global_batch_norm(world, output):
    check(world, "image_vicreg", resnet(output), torch.float64, 1e-9, shared=("std", "cov"))


def test_vit():
    check(2, "image_vicreg", ["family.encoder.kind=vit"], torch.float64, 1e-9, shared=("std", "cov"))


def test_losses_of_views():
    settings = [("image_vicreg", [*VIEW_LOSSES[kind], *MANY_VIEWS], torch.float64) for kind in VIEW_LOSSES]
    ranks = on_ranks(2, each_on_this_rank, settings)
    for number, (kind, changes, dtype) in enumerate(settings):
        compare([rank[number] for rank in ranks], kind, changes, dtype, 1e-9)


@pytest.mark.parametrize("world", [2, 4])
def test_ijepa(world):
    check(world, "ijepa", ["family.encoder.drop_path=0.2"], torch.float64, 1e-9)


def accumulate(parts):
    """Losses and gradients of each accumulated setting, of this rank's slice in `parts` micro-batches."""
    found = []
    for kind, changes in (case.values for case in ACCUMULATED):
        family, batch = family_and_batch(kind, changes, torch.float64)
        module = family if world_size() == 1 else DistributedDataParallel(family)
        part = batch.split(world_size())[rank()]
        losses = backward(module, family, part, parts=parts, autocast=nullcontext, scale=lambda total: total)
        found.append((losses.total, {name: p.grad for name, p in family.named_parameters() if p.grad is not None}))
    return found


@pytest.mark.parametrize("world, parts", [(2, 2), (4, 1)])
def test_ranks_and_micro_batches_are_interchangeable(world, parts):
    """1 × 4, which the numerics hold to the undivided batch, against 2 × 2 and 4 × 1."""
    alone, together = accumulate(4), on_ranks(world, accumulate, parts)
    for (total, gradients), *ranks in zip(alone, *together, strict=True):
        torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean().detach(), total, rtol=1e-9, atol=0)
        scale = torch.stack([g.norm() for g in gradients.values()]).max()
        for _, found in ranks:
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                assert (found[name] - gradient).norm() / scale < 1e-9, name


@pytest.mark.parametrize("changes", [[], ["family.fpn=concat", "family.views=2"]], ids=["", "fpn"])
def test_hjepa(changes):
    check(2, "hjepa", ["family.encoder.drop_path=0.2", *changes], torch.float64, 1e-9)


@pytest.mark.parametrize("kind", ["image_vicreg", "ijepa", "hjepa"])
def test_fp32(kind):
    check(2, kind, [], torch.float32, 1e-3)


def steps_on_this_rank(kind, changes, steps):
    """Target encoder's weights after optimiser steps under DDP."""
    config = family_config(kind, *changes)
    family = make_family(config)
    module = DistributedDataParallel(family)
    optimizer = torch.optim.SGD([p for p in family.parameters() if p.requires_grad], 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        losses_and_gradients(module, random_batch(family, config, BATCH, step=step).split(world_size())[rank()])
        optimizer.step()
        family.after_step((step + 1) / steps)
    return family.target_encoder.state_dict()


@pytest.mark.parametrize("kind, changes, moving", [("ijepa", [], 40), ("hjepa", ["family.fpn=add"], 44)])
def test_the_target_encoder_moves_under_ddp_alike_on_all_ranks(kind, changes, moving):
    changes = [*changes, "family.momentum.start=0.5", "family.momentum.end=0.9"]
    start = make_family(family_config(kind, *changes)).target_encoder.state_dict()
    first, second = on_ranks(2, steps_on_this_rank, kind, changes, 2)
    moved = [name for name in start if not torch.equal(start[name], first[name])]
    assert len(moved) == moving and "blocks.0.attn.qkv.weight" in moved
    assert all(torch.equal(first[name], second[name]) for name in start)


def normalise_part(x, training):
    torch.manual_seed(0)
    layer = GlobalBatchNorm(3).double().train(training)
    part = x.chunk(world_size())[rank()].clone().requires_grad_()
    y = layer(part)
    (y * torch.arange(y.shape[1]).view(1, -1, 1, 1) * y).sum().backward()
    return y.detach(), part.grad, layer.running_mean, layer.running_var, layer.weight.grad


def test_global_batch_norm_is_batch_norm_over_all_ranks():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64) * 3 + 1
    layer = torch.nn.BatchNorm2d(3).double()
    whole = x.clone().requires_grad_()
    y = layer(whole)
    (y * torch.arange(3).view(1, -1, 1, 1) * y).sum().backward()
    ranks = on_ranks(2, normalise_part, x, True)
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), y.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), whole.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ranks[0][4] + ranks[1][4], layer.weight.grad, rtol=1e-9, atol=1e-9)
    for found in ranks:
        torch.testing.assert_close(found[2], layer.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[3], layer.running_var, rtol=1e-12, atol=1e-12)
