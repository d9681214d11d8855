"""Small families and batches of random images for tests."""

import tempfile
from contextlib import suppress

import pytest
import torch

from jobs import recipes
from service.data.draws import hash_torch, key
from service.data.store import Store
from service.engine.loop import Run, train
from service.families import build_family
from service.families.base import Batch
from tests.configs import TINY

SMALL_VIT = [
    "data.image_size=32",
    "family.encoder.depth=3",
    "family.predictor.width=24",
    "family.predictor.depth=2",
    "family.predictor.heads=2",
]
_RECIPES = {
    "image_vicreg": ("demo", []),
    "ijepa": ("ijepa-cpu", SMALL_VIT),
    "hjepa": ("hjepa-cpu", SMALL_VIT),
}
_VICREG_ONLY = ("family.encoder.width", "family.projector")


def family_config(kind, *changes):
    """Config of a small family of one kind."""
    recipe, own = _RECIPES[kind]
    shared = [o for o in TINY if kind == "image_vicreg" or not o.startswith(_VICREG_ONLY)]
    return recipes.load(recipe, ["data.uri=none", *shared, *own, *changes])


def make_family(config, dtype=torch.float64):
    """The family of a config, with the weights of seed 0."""
    torch.manual_seed(0)
    return build_family(config).to(dtype)


def random_batch(family, config, size, dtype=torch.float64, step=0):
    """A whole global batch of random views."""
    generator = torch.Generator().manual_seed(1)
    side = config.data.image_size
    views = torch.randn(family.views, size, 3, side, side, dtype=dtype, generator=generator)
    keys = hash_torch(key(0, step), torch.arange(size))
    masks = family.draw_masks(0, step, 0, size, 0.0)
    drawn = (None, None) if masks is None else map(torch.from_numpy, masks)
    local = None
    if config.data.local is not None:
        side = config.data.local.size
        local = torch.randn(family.local_views, size, 3, side, side, dtype=dtype, generator=generator)
    return Batch(views, keys, *drawn, local)


def assert_all_but_the_target_encoder_learn(family, batch):
    """Every trained parameter has a gradient, and the target encoder's have none."""
    family(batch).total.backward()
    for name, parameter in family.named_parameters():
        if name.startswith("target_encoder") or not parameter.requires_grad:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Losses of `image_vicreg` by name, and settings for more than two views.
VIEW_LOSSES = {
    "vicreg": ["family.loss={kind: vicreg, inv: 2, std: 3, cov: 4, cov_norm: offdiag_mean}"],
    "bcs": ["family.loss={kind: sigreg, variant: bcs, slices: 16}"],
    "lejepa": ["family.loss={kind: sigreg, slices: 16}"],
    "hybrid": ["family.loss={kind: vicreg_sigreg, inv: 2, std: 3, cov: 4, sigreg: 5, slices: 16, cov_norm: paper}"],
    "nt_xent": ["family.loss={kind: nt_xent, temperature: 0.2}"],
}
MANY_VIEWS = ["family.views=3", "data.local={count: 2, size: 8}"]

# Families and settings whose micro-batches must add up to the batch; batch norm is refused.
END_TO_END = ["family.momentum=null", "family.regulariser={kind: sigreg, weight: 1.0, slices: 16}"]
GROUP = ["family.encoder.norm=group", "family.projector.norm=layer"]
ACCUMULATED = [
    pytest.param("image_vicreg", [*GROUP, "family.projector.output=8"], id="vicreg-moments"),
    pytest.param("ijepa", ["family.encoder.drop_path=0.2"], id="ijepa"),
    pytest.param("hjepa", ["family.encoder.drop_path=0.2", "family.views=2"], id="hjepa"),
    pytest.param("hjepa", END_TO_END, id="hjepa-end-to-end"),
    pytest.param("image_vicreg", [*GROUP, "family.projector.output=32"], id="vicreg-gathered"),
    *(pytest.param("image_vicreg", [*GROUP, *VIEW_LOSSES[kind], *MANY_VIEWS], id=kind) for kind in VIEW_LOSSES),
]


class _Enough(Exception):  # noqa: N818
    """The losses are known: what follows would only evaluate the encoder."""


def first_losses(config, steps):
    """Losses of a run's first steps; it must log every step."""
    threads, found = torch.get_num_threads(), []

    def take(step, row):
        found.append(row["loss"])
        if step == steps:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        train(config, Run(Store(folder)), rows=take)
    torch.set_num_threads(threads)
    return found
