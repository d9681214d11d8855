"""I-JEPA: what is seen, what is predicted, what the target encoder is; and the transformer under it."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from service.config import Momentum
from service.families.ijepa import momentum
from service.losses import prediction_losses
from service.models.blocks import patch_coordinates, rope_angles, run_blocks, sincos_positions, take, use_fused
from service.models.vit import Predictor, VisionTransformer
from tests.families import (
    assert_all_but_the_target_encoder_learn,
    family_config,
    make_family,
    random_batch,
)


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer("tiny", 4, 16, **{"depth": 3} | options).double()


def images(count=4, side=16):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_weights_go_into_timm_and_mean_the_same():
    ours = vit(layer_scale=1e-5)
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0, "init_values": 1e-5}
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=3, **options).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(images()), theirs.eval()(images()), rtol=1e-9, atol=1e-9)


def test_sincos_weights_go_into_timm_too():
    ours = vit(positions="sincos")
    assert not ours.pos_embed.requires_grad
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0, "depth": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, **options).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(images()), theirs.eval()(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_dropped_patches_are_not_computed_and_not_seen(positions):
    model = vit(positions=positions).eval()
    x = images()
    keep = torch.stack([torch.randperm(16)[:5].sort()[0] for _ in range(4)])
    flops = []
    for kept in (None, keep):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = model.tokens(x, kept)
        flops.append(counter.get_total_flops())
    assert out.shape == (4, 5, 192)
    assert flops[1] / flops[0] < 0.36  # 5 of 16 tokens; the patch embedding is of all
    hidden = torch.ones(4, 16, dtype=torch.bool)
    hidden[torch.arange(4)[:, None], keep] = False
    noise = 100 * hidden.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(model.tokens(x + noise, keep), out)
    everything = torch.arange(16).expand(4, -1)
    torch.testing.assert_close(model.tokens(x, everything), model.tokens(x))


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope"])
def test_any_resolution(positions):
    model = vit(positions=positions).eval()
    assert model(images(2, 32)).shape == (2, 192)
    assert model.tokens(images(2, 24)).shape == (2, 36, 192)
    assert not torch.allclose(model(images()), model(images().flip(-1)))


def test_rotary_attention_depends_on_differences_of_positions():
    angles = rope_angles(patch_coordinates((8, 8)), 32).double()
    q, k = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[:, :32]

    def turned(x, patch):
        a, b = x.chunk(2)
        cos, sin = angles[patch].cos(), angles[patch].sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos])

    here = turned(q, 9) @ turned(k, 27)  # (1, 1) and (3, 3)
    there = turned(q, 20) @ turned(k, 38)  # (2, 4) and (4, 6)
    elsewhere = turned(q, 20) @ turned(k, 39)
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7)
    assert abs(here - elsewhere) > 1e-3


def test_sincos_positions_are_the_formula():
    table = sincos_positions(patch_coordinates((3, 5)), 16).double().numpy()
    for row in range(3):
        for column in range(5):
            expected = [f(p / 10**i) for p in (row, column) for f in (math.sin, math.cos) for i in range(4)]
            np.testing.assert_allclose(table[row * 5 + column], expected, atol=1e-6)


def test_every_option_of_the_encoder_acts():
    x = images()
    plain = vit()(x)
    for options in ({"positions": "sincos"}, {"positions": "rope"}, {"layer_scale": 1e-2}):
        assert not torch.allclose(vit(**options)(x), plain, rtol=1e-3), options
    fused, two = (vit(attention=name)(x) for name in ("fused", "plain"))
    torch.testing.assert_close(fused, two, rtol=1e-9, atol=1e-9)
    assert use_fused(x, "fused") and not use_fused(x, "plain") and use_fused(x, "auto")
    gradients = []
    for checkpointing in (False, True):
        model = vit(checkpointing=checkpointing).train()
        model(x).square().mean().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)


def test_checkpointing_keeps_less():
    kept = []
    for checkpointing in (False, True):
        model, held = vit(checkpointing=checkpointing).train(), []

        def hold(tensor, into=held):
            into.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            model.tokens(images())
        kept.append(sum(held))
    assert kept[1] < kept[0] / 4


def test_drop_path_is_a_function_of_the_sample_and_the_step():
    model = vit(drop_path=0.5).train()
    x, keys = images(8), torch.arange(8)
    whole = model.tokens(x, keys_B=keys)
    torch.testing.assert_close(model.tokens(x[2:5], keys_B=keys[2:5]), whole[2:5])
    assert not torch.allclose(model.tokens(x, keys_B=keys + 100), whole)
    torch.testing.assert_close(model.eval().tokens(x), vit().tokens(x))


def test_drop_path_keeps_the_mean():
    from service.models import blocks

    factors = blocks._survivors(torch.arange(20_000), 3, 0.3, torch.zeros(1))
    for factor in factors:
        assert factor.unique().tolist() == pytest.approx([0, 1 / 0.7])
        assert factor.mean() == pytest.approx(1, abs=0.02)
    assert not torch.equal(*factors)


def test_predictions_know_their_place_and_not_each_other():
    torch.manual_seed(0)
    predictor = Predictor(192, 24, 2, 2, [patch_coordinates((4, 4))]).double().eval()
    encoded, context = torch.randn(3, 5, 192, dtype=torch.float64), torch.stack([torch.arange(5)] * 3)
    targets = torch.tensor([[[6, 7], [8, 9]]] * 3)
    (both,) = predictor(encoded, context, [targets])
    assert both.shape == (3, 2, 2, 192)
    (alone,) = predictor(encoded, context, [targets[:, 1:]])
    torch.testing.assert_close(both[:, 1:], alone)
    assert not torch.allclose(both[:, 0], predictor(encoded, context, [targets + 6])[0][:, 0])
    assert not torch.allclose(both, predictor(encoded, context + 5, [targets])[0])


def test_target_equals_context_at_first_and_follows():
    config = family_config("ijepa", "family.momentum.start=0.75", "family.momentum.end=0.75")
    family = make_family(config)
    pairs = list(zip(family.context_encoder.parameters(), family.target_encoder.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and not any(b.requires_grad for _, b in pairs)
    before = family.target_encoder.blocks[0].mlp.fc1.weight.clone()
    with torch.no_grad():
        family.context_encoder.blocks[0].mlp.fc1.weight.add_(1.0)
    family.after_step(0.5)
    torch.testing.assert_close(family.target_encoder.blocks[0].mlp.fc1.weight, before + 0.25)


@pytest.mark.parametrize("schedule, middle", [("linear", 0.9), ("cosine", 0.9)])
def test_momentum_schedule(schedule, middle):
    config = Momentum(start=0.8, end=1.0, schedule=schedule)
    assert [momentum(config, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.8, middle, 1.0])
    quarter = 0.85 if schedule == "linear" else 0.8 + 0.2 * (1 - math.cos(math.pi / 4)) / 2
    assert momentum(config, 0.25) == pytest.approx(quarter)


def test_the_loss_is_the_distance_to_normalised_target_tokens():
    config = family_config("ijepa")
    family = make_family(config).eval()
    batch = random_batch(family, config, 6)
    total = family(batch).total
    with torch.no_grad():
        seen = family.target_encoder.tokens(batch.views[0]).numpy()
        encoded = family.context_encoder.tokens(batch.views[0], batch.context)
        predicted = family.predictor(encoded, batch.context, [batch.targets])[0].numpy()
    wanted = (seen - seen.mean(-1, keepdims=True)) / np.sqrt(seen.var(-1, keepdims=True) + 1e-5)
    losses = []
    for b in range(6):
        for m, target in enumerate(batch.targets[b].numpy()):
            gap = np.abs(predicted[b, m] - wanted[b, target])
            losses.append(np.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
    assert total.item() == pytest.approx(np.mean(losses), rel=1e-9)


def test_gradients_flow_into_context_encoder_and_predictor_only():
    config = family_config("ijepa")
    family = make_family(config).train()
    assert_all_but_the_target_encoder_learn(family, random_batch(family, config, 4))


@pytest.mark.parametrize(
    "change",
    ["loss=mse", "loss=cosine", "normalise_targets=none", "masking.kind=guide", "masking.kind=random",
     "masking.kind=block", "masking.targets.count=2", "encoder.positions=rope",
     "target=pooled", "views=2", "normalise_targets=l2",
     "regulariser={kind: nt_xent}", "curriculum.count=1"],
)  # fmt: skip
def test_every_option_of_the_family_acts(change):
    totals = []
    for changes in ([], [f"family.{change}"]):
        config = family_config("ijepa", *changes)
        family = make_family(config)
        totals.append(family(random_batch(family, config, 4)).total.item())
    assert totals[0] != pytest.approx(totals[1], rel=1e-6)


def test_eval_encoder_names_the_encoder():
    for name in ("target", "context"):
        family = make_family(family_config("ijepa", f"family.eval_encoder={name}"))
        assert family.encoder is getattr(family, f"{name}_encoder")


@pytest.mark.parametrize("kind", ["smooth_l1", "mse", "cosine"])
def test_prediction_losses_against_numpy(kind):
    a, b = (torch.randn(3, 5, 7, dtype=torch.float64) * 2 for _ in range(2))
    gap = np.abs((a - b).numpy())
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    expected = {
        "smooth_l1": np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(),
        "mse": (gap**2).mean(),
        "cosine": 1 - cosine.mean().item(),
    }
    assert prediction_losses(a, b, kind).mean().item() == pytest.approx(expected[kind], rel=1e-12)
    assert prediction_losses(a[1:2], b[1:2], kind).item() == prediction_losses(a, b, kind)[1].item()
    assert torch.autograd.gradcheck(lambda x: prediction_losses(x, b, kind), a.requires_grad_())


def test_take_gathers_tokens():
    x = torch.arange(2 * 6 * 3).view(2, 6, 3)
    patches = torch.tensor([[[0, 5], [2, 1]], [[3, 3], [4, 0]]])
    found = take(x, patches)
    assert found.shape == (2, 2, 2, 3)
    assert torch.equal(found[1, 0, 1], x[1, 3]) and torch.equal(found[0, 1, 0], x[0, 2])
    assert torch.equal(take(x[:1], patches)[1, 0, 1], x[0, 3])


def test_blocks_without_angles_are_timm_blocks():
    model = vit().eval()
    x = torch.randn(2, 16, 192, dtype=torch.float64)
    expected = x
    for block in model.blocks:
        expected = timm.models.vision_transformer.Block.forward(block, expected)
    torch.testing.assert_close(run_blocks(model.blocks, x), expected, rtol=1e-9, atol=1e-9)
    assert F.mse_loss(run_blocks(model.blocks, x), x) > 0


@pytest.mark.parametrize("fused", ["fused", "plain"])
@pytest.mark.parametrize("turned", [False, True])
def test_tokens_that_nobody_asks_for_are_seen_but_not_computed(fused, turned):
    model = VisionTransformer("tiny", 4, 16, depth=2).double().train()
    angles = rope_angles(patch_coordinates((4, 4)), 64).double()[None] if turned else None
    x = torch.randn(3, 16, 192, dtype=torch.float64)
    options = {"angles": angles, "attention": fused, "drop_path": 0.5, "keys_B": torch.arange(3)}
    whole, some = (run_blocks(model.blocks, x, **options, unasked=count) for count in (0, 10))
    torch.testing.assert_close(some, whole[:, 10:], rtol=1e-9, atol=1e-12)
    with FlopCounterMode(display=False) as counted:
        run_blocks(model.blocks, x, **options)
    with FlopCounterMode(display=False) as fewer:
        run_blocks(model.blocks, x, **options, unasked=10)
    assert fewer.get_total_flops() < 0.85 * counted.get_total_flops()
