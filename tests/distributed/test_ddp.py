"""Two processes with half the batch each are one process with the whole: losses, gradients, statistics."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from service.families import build_family
from service.models.batchnorm import GlobalBatchNorm, synchronise
from tests.configs import tiny
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed
BATCH = 16


def family_and_views(output, kind, dtype):
    encoder = {"family__encoder__kind": kind} if kind == "vit" else {}
    config = tiny(family__projector__output=output, **encoder)
    torch.manual_seed(0)
    family = build_family(config).to(dtype)
    views = torch.randn(2, BATCH, 3, 16, 16, dtype=dtype)
    return family, views


def losses_and_gradients(module, views):
    losses = module(views)
    losses.total.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}
    return losses.total.detach(), losses.terms, gradients


def on_this_rank(output, kind, dtype):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    family, views = family_and_views(output, kind, dtype)
    module = DistributedDataParallel(synchronise(family, cuda=False))
    return losses_and_gradients(module, views.chunk(world, dim=1)[rank])


def check(world, output, kind, dtype, tolerance):
    total, terms, gradients = losses_and_gradients(*family_and_views(output, kind, dtype))
    ranks = on_ranks(world, on_this_rank, output, kind, dtype)
    mean = torch.stack([r[0] for r in ranks]).mean()
    torch.testing.assert_close(mean, total, rtol=tolerance, atol=0)
    for name in ("std", "cov"):
        for rank in ranks:
            torch.testing.assert_close(rank[1][name], terms[name], rtol=tolerance, atol=0)
    scale = torch.stack([g.norm() for g in gradients.values()]).max()
    for name, gradient in gradients.items():
        error = (ranks[0][2][name] - gradient).norm() / scale
        assert error < tolerance, name
        assert torch.equal(ranks[0][2][name], ranks[1][2][name])
    assert scale > 0


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("output", [8, 32], ids=["moments", "gathered"])
def test_resnet_with_global_batch_norm(world, output):
    check(world, output, "resnet", torch.float64, 1e-9)


def test_vit():
    check(2, 32, "vit", torch.float64, 1e-9)


def test_fp32():
    check(2, 32, "resnet", torch.float32, 1e-3)


def normalise_part(x, training):
    torch.manual_seed(0)
    layer = GlobalBatchNorm(3).double().train(training)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    part = x.chunk(world)[rank].clone().requires_grad_()
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
    for rank in ranks:
        torch.testing.assert_close(rank[2], layer.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank[3], layer.running_var, rtol=1e-12, atol=1e-12)
