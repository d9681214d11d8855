"""Joint embedding of views: each loss from the embeddings of the whole family, by NumPy; every option acts."""

import numpy as np
import pytest
import torch

from service.losses import invariance, pair_distance
from service.sigreg import directions
from tests.families import MANY_VIEWS, VIEW_LOSSES, family_config, make_family, random_batch
from tests.numerics.test_losses import nt_xent_oracle, oracle
from tests.numerics.test_sigreg import published


def outcome(*changes, size=6, step=0):
    config = family_config("image_vicreg", *changes)
    family = make_family(config)
    batch = random_batch(family, config, size, step=step)
    return family, batch, family(batch)


def embeddings(family, batch):
    """Embeddings of all views, global ones first, in NumPy."""
    with torch.no_grad():
        rows = [family.encoder(v.flatten(0, 1)) for v in (batch.views, batch.local) if v is not None]
        return list(family.projector(torch.cat(rows)).unflatten(0, (-1, len(batch.keys))).numpy())


def pairs_apart(views, local):
    """Mean squared distance of pairs of global views, if there are no crops; else by way of their mean."""
    centre, every = np.mean(views, 0), [*views, *local]
    return 2 * len(views) / (len(views) - 1) * np.mean([(z - centre) ** 2 for z in every])


def sliced(every, batch, variant):
    slices = directions(int(batch.keys.sum()), every[0].shape[1], 16, torch.zeros(1, dtype=torch.float64)).numpy()
    return np.mean([published((z @ slices), variant).mean() for z in every])


def expected(kind, views, local, batch):
    every = [*views, *local]
    inv = pairs_apart(views, local)
    if kind in ("vicreg", "hybrid"):
        norm = "offdiag_mean" if kind == "vicreg" else "paper"
        parts = [oracle(z, z, 1.0, norm) for z in every]
        total = 2 * inv + sum(w * np.mean([part[term] for part in parts]) for term, w in (("std", 3), ("cov", 4)))
        return total + (5 * sliced(every, batch, "lejepa") if kind == "hybrid" else 0)
    if kind == "bcs":
        return inv + 10 * sliced(every, batch, "bcs")
    if kind == "lejepa":
        inv = np.mean([(z - np.mean(views, 0)) ** 2 for z in every])
        return 0.98 * inv + 0.02 * sliced(every, batch, "lejepa")
    chosen = [(a, b) for i, a in enumerate(views) for b in [*views[i + 1 :], *local]]
    return np.mean([nt_xent_oracle(a, b, 0.2) for a, b in chosen])


@pytest.mark.parametrize("many", [False, True], ids=["two views", "three and local crops"])
@pytest.mark.parametrize("kind", VIEW_LOSSES)
def test_losses_are_those_of_the_definitions(kind, many):
    family, batch, losses = outcome(*VIEW_LOSSES[kind], *(MANY_VIEWS if many else []))
    z = embeddings(family, batch)
    views, local = z[: len(batch.views)], z[len(batch.views) :]
    assert len(local) == (2 if many else 0)
    assert losses.total.item() == pytest.approx(expected(kind, views, local, batch), rel=1e-9)
    assert losses.features["encoder"].shape == (len(views), 6, family.encoder.dim)
    np.testing.assert_allclose(losses.features["projector"].numpy(), views, rtol=1e-9, atol=1e-12)


def test_distance_of_pairs_is_that_of_every_pair():
    z = torch.randn(4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = [(z[i] - z[j]).square().mean() for i in range(4) for j in range(i)]
    torch.testing.assert_close(pair_distance(list(z)), torch.stack(apart).mean(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(
        lambda a, b, c: invariance([a, b], [c]), [x.clone().requires_grad_() for x in z[:3]]
    )


@pytest.mark.parametrize("kind", VIEW_LOSSES)
def test_gradients_reach_every_parameter(kind):
    family, _, losses = outcome(*VIEW_LOSSES[kind], *MANY_VIEWS)
    losses.total.backward()
    for name, parameter in family.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


@pytest.mark.parametrize(
    "kind, change",
    [("vicreg", f"loss.{k}=7") for k in ("inv", "std", "cov", "gamma")]
    + [("vicreg", "loss.cov_norm=paper"), ("vicreg", "projector.layers=1"), ("vicreg", "projector.layers=0")]
    + [("vicreg", "projector.norm=layer"), ("vicreg", "projector.output=8"), ("vicreg", "projector.hidden=8")]
    + [("lejepa", "loss.weight=0.1"), ("lejepa", "loss.slices=9"), ("lejepa", "loss.variant=bcs")]
    + [("hybrid", "loss.sigreg=1"), ("hybrid", "loss.variant=bcs"), ("nt_xent", "loss.temperature=1")]
    + [("nt_xent", "views=3"), ("lejepa", "views=4")],
)
def test_every_option_acts(kind, change):
    plain, changed = (outcome(*VIEW_LOSSES[kind], *more)[2].total.item() for more in ([], [f"family.{change}"]))
    assert changed != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("change", ["count=3", "size=12"])
def test_local_crops_act(change):
    totals = [
        outcome(*VIEW_LOSSES["lejepa"], *more)[2].total.item()
        for more in ([], MANY_VIEWS[1:], [*MANY_VIEWS[1:], f"data.local.{change}"])
    ]
    assert len({round(total, 9) for total in totals}) == 3


def test_slices_are_drawn_anew_every_step():
    totals = {outcome(*VIEW_LOSSES["bcs"], step=step)[2].total.item() for step in (0, 0, 1)}
    assert len(totals) == 2


def test_views_drop_paths_of_their_own():
    vit = ["family.encoder={kind: vit, depth: 2, patch_size: 8}", "family.projector.norm=layer", *VIEW_LOSSES["vicreg"]]
    config = family_config("image_vicreg", *vit, "family.encoder.drop_path=0.5")
    family = make_family(config)
    batch = random_batch(family, config, 6)
    same = batch._replace(views=batch.views[:1].expand(2, -1, -1, -1, -1))
    assert family.train()(same).terms["inv"] > 0
    assert family.eval()(same).terms["inv"] == 0
