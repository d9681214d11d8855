"""H-JEPA: what a level is, that masks cut no cell, what is predicted, and that every setting acts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datasets_prep.errors import UserError
from service.config import ViT
from service.masks import nested_order
from service.models.pyramid import Pyramid, PyramidTransformer
from service.models.vit import SIZES
from tests.families import (
    assert_all_but_the_target_encoder_learn,
    family_config,
    make_family,
    random_batch,
)

THREE = ["family.levels=3", "family.weights=null", "family.whole_image=true"]


def pyramid(levels=3, side=32, **options):
    torch.manual_seed(0)
    shape = {"size": "tiny", "patch_size": 4, "image_size": side, "depth": 3}
    return PyramidTransformer(levels, **shape | options).double().eval()


def images(count=2, side=32):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pooled_by_hand(grid_HWD, side):
    """Means over `side`×`side` squares, one after the other, in raster order."""
    rows, columns = (extent // side for extent in grid_HWD.shape[:2])
    squares = [
        grid_HWD[r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(columns)
    ]
    return np.stack([square.mean((0, 1)) for square in squares])


def centre_in_raster_order(model, level):
    """Place in a level's tokens of each cell in raster order."""
    row, column = model.coordinates()[level].numpy().T
    return np.lexsort((column, row))


@pytest.mark.parametrize("grid", [(8, 8), (4, 12)])
def test_nested_order_keeps_squares_together(grid):
    order = nested_order(grid, 4)
    assert sorted(order) == list(range(grid[0] * grid[1]))
    for run in (4, 16):
        for start in range(0, len(order), run):
            row, column = np.divmod(order[start : start + run], grid[1])
            side = int(run**0.5)
            assert np.ptp(row) == np.ptp(column) == side - 1
            assert row.min() % side == 0 and column.min() % side == 0


def test_pooling_is_two_dimensional():
    model = pyramid()
    x = images()
    levels = model.pyramid(x)
    assert [tuple(level.shape) for level in levels] == [(2, 64, 192), (2, 16, 192), (2, 4, 192)]
    depths = [t.detach().numpy() for t in model.at_depths(x, (1, 2, 3))]
    for level, tokens in enumerate(depths):
        tokens = model.norm(torch.from_numpy(tokens)).detach().numpy() if level == 2 else tokens
        if level < 2:
            tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
        found = levels[level].detach().numpy()[:, centre_in_raster_order(model, level)]
        for image in range(2):
            expected = pooled_by_hand(tokens[image].reshape(8, 8, -1), 2**level)
            np.testing.assert_allclose(found[image], expected, rtol=1e-9, atol=1e-12)
            in_rows = tokens[image].reshape(-1, 4**level, 192).mean(1)  # what pooling runs of raster tokens gives
            assert level == 0 or np.abs(in_rows - expected).max() > 0.01


def test_the_whole_image_is_the_mean_of_all_tokens():
    model = pyramid(whole_image=True)
    levels = model.pyramid(images())
    assert [level.shape[1] for level in levels] == [64, 16, 1]
    torch.testing.assert_close(levels[2][:, 0], model.tokens(images()).mean(1))
    torch.testing.assert_close(model.coordinates()[2], torch.full((1, 2), 3.5, dtype=torch.float64))


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_the_feature_pyramid_is_lateral_maps_and_a_top_down_path(fusion):
    model = pyramid(fpn=fusion)
    plain, mixed = pyramid().pyramid(images()), model.pyramid(images())
    lateral = [model.fpn.lateral[level](plain[level]) for level in range(3)]
    grids = [centre_in_raster_order(model, level) for level in range(3)]
    above = lateral[2]
    torch.testing.assert_close(mixed[2], above)
    for level in (1, 0):
        side = 8 // 2**level
        upper = above[:, grids[level + 1]].view(2, side // 2, side // 2, -1)
        nearest = upper.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        own = lateral[level][:, grids[level]]
        joined = torch.cat([own, nearest], -1)
        expected = own + nearest if fusion == "add" else model.fpn.fuse[level](joined)
        torch.testing.assert_close(mixed[level][:, grids[level]], expected)
        above = mixed[level]


@pytest.mark.parametrize("fpn", [None, "add", "concat"])
def test_a_representation_is_the_mean_of_its_level_at_any_resolution(fpn):
    x = images()
    every = pyramid(fpn=fpn).every_level(x)
    for level, tokens in enumerate(pyramid(fpn=fpn).pyramid(x)):
        torch.testing.assert_close(every[:, level], tokens.mean(1))
        torch.testing.assert_close(pyramid(fpn=fpn, eval_level=level + 1)(x), tokens.mean(1))
    torch.testing.assert_close(pyramid(fpn=fpn)(x), every[:, 2])
    together = pyramid(fpn=fpn, eval_level="all")
    assert together.dim == 576
    torch.testing.assert_close(together(x), every.flatten(1))
    assert together(images(2, 28)).shape == (2, 576)  # a grid of 7×7, which no cell of 2×2 tiles
    assert (every[:, 0] - every[:, 1]).abs().mean() > 0.01 and (every[:, 1] - every[:, 2]).abs().mean() > 0.01


def test_context_is_the_kept_cells_and_costs_no_more():
    model, x = pyramid(), images()
    keep = torch.from_numpy(np.sort(nested_order((8, 8), 4)[16:32]))[None].expand(2, -1)  # the top right cell
    flops = []
    for encode in (lambda: model.pyramid(x), lambda: model.context(x, keep)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode()
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] < 0.3  # 16 of 64 tokens; the patch embedding is of all
    tokens, means = model.context(x, keep)
    assert tokens.shape == (2, 16, 192) and means.shape == (2, 3, 192)
    torch.testing.assert_close(means[:, 2], tokens.mean(1))
    hidden = x.clone()
    hidden[:, :, 16:] += 100
    hidden[:, :, :, :16] += 100
    torch.testing.assert_close(model.context(hidden, keep)[0], tokens)


def test_places_are_the_cells_that_patches_fill():
    model = pyramid()
    patches = torch.from_numpy(np.sort(nested_order((8, 8), 4)[[*range(0, 16), *range(48, 64)]]))[None, None]
    places = model.places(patches)
    assert [p.shape for p in places] == [(1, 1, 32), (1, 1, 8), (1, 1, 2)]
    for level, numbers in enumerate(places):
        row, column = model.coordinates()[level][numbers.flatten()].T
        assert set(torch.stack([row // 4, column // 4], 1).unique(dim=0).flatten().tolist()) == {0.0, 1.0}
        assert ((row < 4) == (column < 4)).all()
        assert numbers.unique().numel() == 32 // 4**level


@pytest.mark.parametrize("changes", [[], THREE, ["data.image_size=64", *THREE[:2]]], ids=["2", "whole", "3"])
def test_no_cell_of_any_level_mixes_context_and_target(changes):
    config = family_config("hjepa", *changes)
    family = make_family(config)
    batch = random_batch(family, config, 16)
    unit, width = config.family.unit, config.data.image_size // 4
    for context, targets in zip(batch.context.numpy(), batch.targets.numpy(), strict=True):
        cells = [{(p // width // unit, p % width // unit) for p in part} for part in (context, targets.ravel())]
        assert not cells[0] & cells[1]
        for part in (context, *targets):
            assert len(part) == len({(p // width // unit, p % width // unit) for p in part}) * unit**2


@pytest.mark.parametrize("how", ["layer", "l2", "none"])
def test_the_loss_is_the_weighted_distance_on_every_level(how):
    weights = [1.0, 0.7, 0.5]
    config = family_config("hjepa", *THREE, f"family.weights={weights}", "family.loss=mse", "family.depths=[1,1,3]",
                           "family.regulariser=null",
                           f"family.normalise_targets={how}")  # fmt: skip
    family = make_family(config).eval()
    batch = random_batch(family, config, 4)
    losses = family(batch)
    encoder = family.context_encoder
    tokens, _ = encoder.context(batch.views[0], batch.context)
    asked = encoder.places(batch.targets)
    predicted = family.predictor(tokens, encoder.places(batch.context)[0], asked)
    per_level = []
    for guess, level, places in zip(predicted, encoder.pyramid(batch.views[0]), asked, strict=True):
        guess, level = guess.detach().numpy(), level.detach().numpy()
        gaps = []
        for b in range(4):
            for m in range(2):
                want = level[b][places[b, m].numpy()]
                if how == "layer":
                    want = (want - want.mean(-1, keepdims=True)) / np.sqrt(want.var(-1, keepdims=True) + 1e-5)
                elif how == "l2":
                    want = want / np.linalg.norm(want, axis=-1, keepdims=True)
                gaps.append(((guess[b, m] - want) ** 2).mean())
        per_level.append(np.mean(gaps))
    assert losses.total.item() == pytest.approx(np.dot(weights, per_level), rel=1e-9)
    for level, expected in enumerate(per_level):
        assert losses.terms[f"prediction_level{level + 1}"].item() == pytest.approx(expected, rel=1e-9)
    assert {name: tuple(f.shape) for name, f in losses.features.items()} == dict.fromkeys(
        ("level1", "level2", "level3"), (1, 4, 192)
    )


def test_target_equals_context_at_first_and_follows():
    config = family_config("hjepa", "family.fpn=add", "family.momentum.start=0.75", "family.momentum.end=0.75")
    family = make_family(config)
    pairs = list(zip(family.context_encoder.parameters(), family.target_encoder.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and not any(b.requires_grad for _, b in pairs)
    before = family.target_encoder.fpn.lateral[0].weight.clone()
    with torch.no_grad():
        family.context_encoder.fpn.lateral[0].weight.add_(1.0)
    family.after_step(0.5)
    torch.testing.assert_close(family.target_encoder.fpn.lateral[0].weight, before + 0.25)


@pytest.mark.parametrize("changes", [[], ["family.fpn=add"], ["family.fpn=concat"], THREE, ["family.views=2"]])
def test_every_weight_learns(changes):
    config = family_config("hjepa", *changes)
    family = make_family(config).train()
    assert_all_but_the_target_encoder_learn(family, random_batch(family, config, 4))


@pytest.mark.parametrize(
    "change",
    ["levels=3,whole_image=true,weights=null", "weights=[1.0,0.7]", "depths=[1,3]", "fpn=add", "fpn=concat",
     "loss=mse", "loss=cosine", "normalise_targets=l2", "normalise_targets=none", "views=2", "masking.targets.count=1",
     "masking.kind=random", "masking.kind=block", "encoder.positions=rope", "encoder.layer_scale=1e-5",
     "regulariser=null", "regulariser.cov=2", "regulariser_weight=0.2", "regulariser={kind: nt_xent}",
     "regulariser={kind: sigreg, slices: 32}", "regulariser={kind: vicreg_sigreg, cov_norm: paper, slices: 32}",
     "predictor.depth=3", "predictor.width=32", "curriculum={count: 1, scale: [0.1, 0.1], stages: 2}"],
)  # fmt: skip
def test_every_option_of_the_family_acts(change):
    parts = [change] if "[" in change or "{" in change else change.split(",")
    totals = []
    for changes in ([], [f"family.{part}" for part in parts]):
        config = family_config("hjepa", *changes)
        family = make_family(config)
        totals.append(family(random_batch(family, config, 4)).total.item())
    assert totals[0] != pytest.approx(totals[1], rel=1e-6)


@pytest.mark.parametrize("option", ["attention=plain", "checkpointing=true"])
def test_fused_attention_and_checkpointing_change_no_gradient(option):
    found = []
    for changes in (["family.encoder.attention=fused"], [f"family.encoder.{option}"]):
        config = family_config("hjepa", *changes)
        family = make_family(config).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            total = family(random_batch(family, config, 4)).total
        total.backward()
        gradients = [p.grad for p in family.parameters() if p.grad is not None]
        found.append((sum(saved), total.detach(), gradients))
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-9, atol=1e-12)
    assert found[1][0] < found[0][0] / 2 if option == "checkpointing=true" else found[1][0] > found[0][0]


@pytest.mark.parametrize("level, width", [("1", 192), ("2", 192), ("all", 384), ("null", 192)])
def test_eval_level_names_the_representation(level, width):
    family = make_family(family_config("hjepa", f"family.eval_level={level}"))
    every = family.target_encoder.eval().every_level(images())
    expected = {"1": every[:, 0], "all": every.flatten(1)}.get(level, every[:, 1])
    assert family.encoder is family.target_encoder and family.encoder.dim == width
    torch.testing.assert_close(family.encoder(images()), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["family.levels=3", "data.image_size=40"], "needs a grid that 4×4 cells tile.*use data.image_size=32,"),
        (["data.image_size=36"], "it has 9×9 patches: use data.image_size=32,"),
        (["family.levels=3", "family.weights=null"], "leaves no context on a 2×2 grid"),
        (["family.weights=[1.0]"], "must have one value for each of family.levels=2"),
        (["family.weights=[0.0,0.0]"], "all zero"),
        (["family.depths=[3,1]"], "must ascend and end with the encoder's last block, 3"),
        (["family.depths=[1,2]"], "last block, 3"),
        (["family.eval_level=3"], "exceeds family.levels=2"),
        (["family.momentum=null", "family.regulariser=null"], "nothing keeps them apart: set family.regulariser"),
        (["data.local.size=16", "family.regulariser=null"], "family.regulariser is none: set it"),
        (["family.curriculum.stages=3", "family.masking.kind=random"], "none of 'paper', 'guide', 'block'"),
        (["family.curriculum={count: 9, scale: [0.3, 0.3]}"], "family.curriculum, a stage between"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(changes, message):
    with pytest.raises(UserError, match=message):
        family_config("hjepa", *changes)


def test_the_config_knows_how_deep_encoders_are():
    assert {size: ViT(size=size).blocks for size in SIZES} == {size: v["depth"] for size, v in SIZES.items()}
    assert ViT(depth=5).blocks == 5


def test_top_down_path_needs_no_grid():
    module = Pyramid(4, 2, "add")
    fine, coarse = torch.randn(1, 8, 4), torch.randn(1, 2, 4)
    mixed, _ = module([fine, coarse])
    torch.testing.assert_close(mixed[:, 5], module.lateral[0](fine[:, 5]) + module.lateral[1](coarse[:, 1]))


SIGREG = "family.regulariser={kind: sigreg, weight: 1.0, slices: 32}"


def test_the_regulariser_is_vicreg_of_pooled_views_on_every_level():
    config = family_config("hjepa", "family.views=2", "family.regulariser.inv=3", "family.regulariser.std=5",
                           "family.regulariser.cov=7", "family.regulariser_weight=0.3")  # fmt: skip
    family = make_family(config).eval()
    batch = random_batch(family, config, 6)
    losses = family(batch)
    views = [family.context_encoder.context(view, batch.context)[1].detach().numpy() for view in batch.views]
    penalties = []
    for level in range(2):
        a, b = (view[:, level] for view in views)
        total = 3 * ((a - b) ** 2).mean()
        for z in (a, b):
            covariance = np.cov(z.T)
            total += 5 * np.maximum(0, 1 - np.sqrt(covariance.diagonal() + 1e-4)).mean()
            total += 7 * (covariance[~np.eye(192, dtype=bool)] ** 2).sum() / 192
        penalties.append(total)
    expected = losses.terms["prediction"].item() + 0.3 * np.mean(penalties)
    assert losses.total.item() == pytest.approx(expected, rel=1e-9)


def test_one_view_is_regularised_against_its_target_and_local_crops_against_both():
    from service.losses import pair_distance

    for crops in ([], ["data.local={count: 3, size: 16}"]):
        config = family_config("hjepa", *crops)
        family = make_family(config).eval()
        batch = random_batch(family, config, 6)
        of_context = family.context_encoder.context(batch.views[0], batch.context)[1]
        of_target = family.target_encoder.every_level(batch.views[0])
        local = [family.context_encoder.every_level(crop) for crop in (batch.local if crops else [])]
        inv = [pair_distance([of_context[:, i], of_target[:, i]], [crop[:, i] for crop in local]) for i in (0, 1)]
        assert family(batch).terms["inv"].item() == pytest.approx(torch.stack(inv).mean().item(), rel=1e-9)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("ijepa", []),
        ("ijepa", ["family.target=pooled", "family.views=2", SIGREG]),
        ("ijepa", ["family.momentum=null", SIGREG]),
        ("hjepa", ["family.fpn=concat"]),
        ("hjepa", ["family.momentum=null", SIGREG]),
        ("hjepa", ["family.views=2", "data.local={count: 2, size: 16}", "family.loss=mse"]),
    ],
)
def test_gradients_against_finite_differences(kind, changes):
    config = family_config(kind, *changes)
    family = make_family(config).train()
    batch = random_batch(family, config, 3)
    family(batch).total.backward()
    trained = [p for p in family.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(2)
    step = [torch.randn(p.shape, dtype=p.dtype, generator=generator) * p.grad.norm() for p in trained]
    step = [s / torch.stack([t.norm() for t in step]).norm() for s in step]
    slope = sum((p.grad * s).sum() for p, s in zip(trained, step, strict=True)).item()
    values = []
    for sign in (1, -2):
        for p, s in zip(trained, step, strict=True):
            p.data.add_(s, alpha=sign * 1e-5)
        values.append(family(batch).total.item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("kind", ["ijepa", "hjepa"])
def test_end_to_end_has_one_encoder_whose_targets_carry_gradients(kind):
    gradients = []
    for changes in ([], ["family.momentum=null"]):
        config = family_config(kind, SIGREG, *changes)
        family = make_family(config).train()
        family(random_batch(family, config, 4)).total.backward()
        gradients.append(family.context_encoder.blocks[0].mlp.fc1.weight.grad)
        family.after_step(1.0)
    assert family.target_encoder is None and family.encoder is family.context_encoder and not family.others
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_the_curriculum_changes_shapes_between_stages_only():
    config = family_config("hjepa", "family.curriculum={stages: 3, count: 1, scale: [0.06, 0.1]}")
    family = make_family(config)
    shapes = [tuple(family.draw_masks(0, 0, 0, 4, p).targets.shape) for p in (0.0, 0.3, 0.34, 0.66, 0.67, 1.0)]
    assert shapes[0] == shapes[1] and shapes[2] == shapes[3] and shapes[4] == shapes[5]
    assert shapes[0][1] == 1 and shapes[5] == (4, 2, family.stages[-1].masking.target_tokens * 4)
    assert len(set(shapes)) == 3
