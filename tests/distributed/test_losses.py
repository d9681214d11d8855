"""Losses of embeddings alone: the ranks' mean and gradients are those of one process with the whole batch."""

import pytest
import torch

from service.losses import nt_xent
from service.sigreg import sigreg
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed
LOSSES = {
    "nt_xent": lambda z: nt_xent(*z, 0.2),
    "bcs": lambda z: sigreg(z[0], 3, slices=16, variant="bcs"),
    "lejepa": lambda z: sigreg(z[0], 3, slices=16, variant="lejepa"),
}


def embeddings():
    return torch.randn(2, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.1


def of_part(rank, world):
    """Every loss of a rank's samples, with gradients as DDP averages them: divided by the world."""
    found = {}
    for name, loss in LOSSES.items():
        z = embeddings().chunk(world, 1)[rank].clone().requires_grad_()
        value = loss(z)
        (gradient,) = torch.autograd.grad(value / world, z)
        found[name] = value.detach(), gradient
    return found


def on_this_rank():
    return of_part(torch.distributed.get_rank(), torch.distributed.get_world_size())


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process(world):
    whole, ranks = of_part(0, 1), on_ranks(world, on_this_rank)
    for name, (value, gradient) in whole.items():
        mean = torch.stack([found[name][0] for found in ranks]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-12, atol=0)
        together = torch.cat([found[name][1] for found in ranks], 1)
        torch.testing.assert_close(together, gradient, rtol=1e-9, atol=1e-12)
        assert gradient.norm() > 1e-3
