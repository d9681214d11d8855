import math

import numpy as np
import pytest
import torch
from torch import nn

from service.optim import Lars, build_optimizer, param_groups, warmup_cosine


def hand_lars(w, grads, *, lr, wd, momentum, trust, clip):
    """Two or more LARS steps of one matrix, term by term."""
    v = np.zeros_like(w)
    for g in grads:
        g = g + wd * w
        rate = trust * np.linalg.norm(w) / np.linalg.norm(g)
        if clip:
            rate = min(rate / lr, 1.0)
        v = momentum * v + rate * g
        w = w - lr * v
    return w


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_lars_equals_a_hand_computation(clip, scale):
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(3, 4, 3)) * scale
    w = nn.Parameter(torch.tensor(start))
    optimizer = Lars([w], lr=0.3, weight_decay=1e-2, momentum=0.9, trust=0.02, clip_lr=clip)
    for g in grads:
        w.grad = torch.tensor(g)
        optimizer.step()
    expected = hand_lars(start, grads, lr=0.3, wd=1e-2, momentum=0.9, trust=0.02, clip=clip)
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-12)


def test_lars_leaves_vectors_to_momentum_sgd():
    layer = nn.Linear(3, 2).double()
    bias = layer.bias.detach().clone()
    optimizer = build_optimizer("lars", layer, lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.02, clip_lr=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5 * (1 + 1.9))


def test_lars_survives_zero_weights_and_gradients():
    w = nn.Parameter(torch.zeros(2, 2))
    optimizer = Lars([w], lr=0.1)
    w.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(w.detach(), torch.zeros(2, 2))


def test_only_matrices_decay():
    groups = param_groups(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 0.1)
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_schedule_meets_its_corners():
    def rate(step):
        return warmup_cosine(step, total=110, warmup=10, lr=0.5, start_lr=3e-5, min_lr=0.01)

    assert rate(0) == 3e-5
    assert rate(10) == 0.5
    assert math.isclose(rate(60), 0.01 + 0.49 / 2)
    assert math.isclose(rate(110), 0.01)
    rates = [rate(step) for step in range(110)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
