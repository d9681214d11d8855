import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from service.models.resnet import ResNet
from service.optim import Lamb, Lars, build_optimizer, cosine, encoder_layer, param_groups, set_rates, warmup_cosine
from tests.families import family_config, make_family


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


def hand_sgd(w, grads, *, lr, wd, nesterov):
    v = np.zeros_like(w)
    for g in grads:
        g = g + wd * w
        v = 0.9 * v + g
        w = w - lr * (g + 0.9 * v if nesterov else v)
    return w


def hand_adam(w, grads, *, lr, wd, kind, eps=1e-8):
    """Adam, AdamW or LAMB of one matrix, term by term."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        g = g + wd * w if kind == "adam" else g
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + eps)
        u = u if kind == "adam" else u + wd * w
        w = w - lr * u * (np.linalg.norm(w) / np.linalg.norm(u) if kind == "lamb" else 1)
    return w


def steps(optimizer, w, grads):
    for g in grads:
        w.grad = torch.tensor(g)
        optimizer.step()
    return w.detach().numpy()


ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}


@pytest.mark.parametrize(
    "kind, options, hand",
    [
        ("sgd", {"momentum": 0.9, "nesterov": False}, lambda *a, **k: hand_sgd(*a, **k, nesterov=False)),
        ("sgd", {"momentum": 0.9, "nesterov": True}, lambda *a, **k: hand_sgd(*a, **k, nesterov=True)),
        ("adam", ADAM, lambda *a, **k: hand_adam(*a, **k, kind="adam")),
        ("adamw", ADAM, lambda *a, **k: hand_adam(*a, **k, kind="adamw")),
        ("lamb", ADAM, lambda *a, **k: hand_adam(*a, **k, kind="lamb")),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "lamb"],
)
def test_optimisers_equal_a_hand_computation(kind, options, hand):
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3))
    layer = nn.Linear(3, 4, bias=False).double()
    layer.weight.data = torch.tensor(start)
    optimizer = build_optimizer(kind, layer, lr=0.1, weight_decay=0.03, **options)
    found = steps(optimizer, layer.weight, grads)
    np.testing.assert_allclose(found, hand(start, grads, lr=0.1, wd=0.03), rtol=1e-11)


def test_lamb_leaves_vectors_to_adam_and_survives_zeros():
    layer, twin = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    twin.load_state_dict(layer.state_dict())
    grads = np.random.default_rng(1).normal(size=(3, 2))
    found = steps(build_optimizer("lamb", layer, lr=0.1, weight_decay=0.5, **ADAM), layer.bias, grads)
    expected = steps(build_optimizer("adamw", twin, lr=0.1, weight_decay=0.5, **ADAM), twin.bias, grads)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    zero = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    np.testing.assert_array_equal(steps(Lamb([zero], lr=0.1), zero, np.zeros((2, 2, 2))), np.zeros((2, 2)))
    assert (steps(Lamb([zero], lr=0.1), zero, np.ones((2, 2, 2))) < 0).all()


FAMILIES = [
    ("ijepa", ["family.encoder.positions=learned", "family.encoder.layer_scale=1e-5"]),
    ("ijepa", []),
    ("hjepa", ["family.fpn=concat"]),
    ("image_vicreg", []),
    ("image_vicreg", ["family.encoder.kind=vit"]),
]


def groups_of(kind, changes, **options):
    """Family, and (group, name) of each parameter in each group that holds it."""
    family = make_family(family_config(kind, *changes))
    groups = param_groups(family, **{"weight_decay": 0.05, **options})
    names = {p: name for name, p in family.named_parameters()}
    return family, groups, [(group, names[p]) for group in groups for p in group["params"]]


@pytest.mark.parametrize("kind, changes", FAMILIES)
def test_each_trained_parameter_is_in_one_group_with_its_rate_and_decay(kind, changes):
    component = {"image_vicreg": "projector"}.get(kind, "predictor")
    family, groups, placed = groups_of(kind, changes, weight_decay_of={component: 0.01}, layer_decay=0.5)
    trained = {name for name, p in family.named_parameters() if p.requires_grad}
    assert Counter(name for _, name in placed) == Counter(trained)
    depth = 1 + max(encoder_layer(name) or 0 for name in trained)
    assert len({group["name"] for group in groups}) == len(groups) <= 2 * (depth + 1) + 1
    rates = set()
    for group, name in placed:
        layer = encoder_layer(name)
        assert group["lr_scale"] == (1.0 if layer is None else 0.5 ** (depth - layer)), name
        rates.add(group["lr_scale"])
        parameter = family.get_parameter(name)
        kept = parameter.ndim == 1 or any(part in name for part in ("mask_token", "pos_embed"))
        expected = 0.0 if kept else 0.01 if name.startswith(component) else 0.05
        assert (group["weight_decay"], group["adapt"]) == (expected, not kept), name
        assert group["scheduled"] == (expected == 0.05), name
    assert len(rates) == depth + 1


@pytest.mark.parametrize("kind, changes", FAMILIES)
def test_a_config_knows_its_familys_trained_components(kind, changes):
    config = family_config(kind, *changes)
    children = {n.partition(".")[0] for n, p in make_family(config).named_parameters() if p.requires_grad}
    assert children == set(config.family.components)


def test_groups_are_few_without_layer_decay():
    _, groups, _ = groups_of("ijepa", [], weight_decay_of={"predictor": 0.04})
    assert [group["name"] for group in groups] == ["weights", "vectors", "predictor.weights"]


def test_a_component_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="names target_encoder, which this family does not train"):
        groups_of("ijepa", [], weight_decay_of={"target_encoder": 0.1})


@pytest.mark.parametrize("stem", ["32px", "224px"])
def test_resnet_layers_are_its_stages(stem):
    family = nn.ModuleDict({"encoder": ResNet(10, 4, stem=stem), "projector": nn.Linear(2, 2)})
    layers = Counter(encoder_layer(name) for name, _ in family.named_parameters())
    assert layers.keys() == {0, 1, 2, 3, 4, None} and (layers[0], layers[None]) == (3, 2)


def test_the_rates_of_a_step_reach_their_groups():
    family, groups, _ = groups_of("ijepa", [], weight_decay_of={"predictor": 0.01}, layer_decay=0.75)
    optimizer = torch.optim.AdamW(groups, 1.0)
    set_rates(optimizer, 0.2, 0.3)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    depth = len(family.context_encoder.blocks) + 1
    assert rates["vectors"] == (0.2, 0.0)  # the encoder's last norm and the predictor's
    assert rates["predictor.weights"] == (0.2, 0.01)
    assert rates["layer0.weights"] == (0.2 * 0.75**depth, 0.3)


def test_schedule_meets_its_corners():
    def rate(step):
        return warmup_cosine(step, total=110, warmup=10, lr=0.5, start_lr=3e-5, min_lr=0.01)

    assert rate(0) == 3e-5
    assert rate(10) == 0.5
    assert math.isclose(rate(60), 0.01 + 0.49 / 2)
    assert math.isclose(rate(110), 0.01)
    rates = [rate(step) for step in range(110)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_weight_decay_follows_a_cosine():
    values = [cosine(0.04, 0.4, step / 100) for step in range(101)]
    assert values[0] == pytest.approx(0.04) and values[-1] == pytest.approx(0.4)
    assert values[50] == pytest.approx(0.22) and values == sorted(values)
    assert values[25] == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2)
