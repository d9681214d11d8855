"""Micro-batches: the losses and gradients of the undivided batch, for every family."""

from contextlib import nullcontext

import pytest
import torch

from service.engine.accumulate import backward
from service.families.base import Batch, Family, Losses
from tests.families import ACCUMULATED, family_config, make_family, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = 16


def losses_and_gradients(kind, changes, parts, scale=1.0):
    config = family_config(kind, *changes)
    family = make_family(config).train()
    batch = random_batch(family, config, BATCH)
    losses = backward(family, family, batch, parts=parts, autocast=nullcontext, scale=lambda total: total * scale)
    return losses, {name: p.grad for name, p in family.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind, changes", ACCUMULATED)
def test_micro_batches_add_up_to_the_batch(kind, changes):
    whole, gradients = losses_and_gradients(kind, changes, 1)
    scale = torch.stack([g.norm() for g in gradients.values()]).max()
    assert scale > 0
    for parts in (2, 4):
        losses, found = losses_and_gradients(kind, changes, parts)
        assert not losses.total.requires_grad
        torch.testing.assert_close(losses.total, whole.total.detach(), rtol=1e-9, atol=0)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() / scale < 1e-9, name
        for name, features in whole.features.items():
            torch.testing.assert_close(losses.features[name], features, rtol=1e-9, atol=1e-12)


def test_statistics_of_the_micro_batches_would_give_another_gradient(monkeypatch):
    """The test above could not fail if the loss were a mean over samples."""
    from service.families.image_vicreg import ImageVicregFamily

    kind, changes = ACCUMULATED[0].values
    _, exact = losses_and_gradients(kind, changes, 4)
    monkeypatch.setattr(ImageVicregFamily, "batch_statistics", False)
    _, plain = losses_and_gradients(kind, changes, 4)
    name = "projector.0.weight"
    assert (exact[name] - plain[name]).norm() / exact[name].norm() > 1e-2


@pytest.mark.parametrize("kind, changes", ACCUMULATED[:2])
def test_the_scale_of_the_loss_scales_the_gradients_once(kind, changes):
    _, plain = losses_and_gradients(kind, changes, 2)
    losses, scaled = losses_and_gradients(kind, changes, 2, scale=1024.0)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], 1024 * gradient, rtol=1e-9, atol=1e-12)
    assert losses.total < 100


class Peak(Family):
    """A quadratic of a batch statistic, whose embedding counts the samples that it holds activations of."""

    views, batch_statistics = 1, True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.seen = []

    def embed(self, batch):
        self.seen.append((len(batch.keys), torch.is_grad_enabled()))
        return {"z": (self.weight * batch.views[0].mean((1, 2, 3)))[:, None]}

    def losses(self, embedded, batch):
        mean = embedded["z"].mean()
        return Losses(mean**2, {"mean": mean.detach()})


def test_each_micro_batch_is_embedded_twice_and_none_larger_holds_gradients():
    views = torch.randn(1, 8, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    family, batch = Peak(), Batch(views, torch.arange(8))
    losses = backward(family, family, batch, parts=4, autocast=nullcontext, scale=lambda total: total)
    assert family.seen == [(2, False)] * 4 + [(2, True)] * 4
    assert family.weight.grad.item() == pytest.approx(2 * family.weight.item() * views.mean().item() ** 2, rel=1e-12)
    assert losses.terms["mean"].item() == pytest.approx(2 * views.mean().item(), rel=1e-12)


def test_a_batch_is_cut_by_samples_in_order():
    views = torch.arange(2 * 6).view(2, 6, 1, 1, 1)
    batch = Batch(views, torch.arange(6), torch.arange(12).view(6, 2))
    first, second = batch.split(2)
    assert torch.equal(first.views.squeeze(), torch.tensor([[0, 1, 2], [6, 7, 8]]))
    assert second.keys.tolist() == [3, 4, 5] and torch.equal(second.context, batch.context[3:])
    assert second.targets is None
