"""Every recipe that ships builds and trains: twenty steps on the embedded digits, everything else as it is written."""

import math

import pytest

from jobs import recipes
from tests.families import first_losses

pytestmark = pytest.mark.distributed
STEPS = 20
BATCH = 4
SMALL = [f"data.batch_size={BATCH}", f"data.partitions={BATCH // 2}", "data.mode=auto", "parallel.workers=1",
         f"schedule.steps={STEPS}", "compute.device=cpu", "compute.precision=fp32", "compute.compile=false",
         "compute.threads=1", "tracking.log_every=1 steps", "eval.every=null"]  # fmt: skip
PATCH = 2


def reduced(name, digits):
    """Settings that make a recipe small: its data, image size, widths, and the rate by the linear rule."""
    config = recipes.load(name)
    family, changes = config.family, [f"data.uri={digits}", *SMALL]
    changes += [
        f"optim.lr={config.optim.lr * BATCH / config.data.batch_size}",
        "schedule.start_lr=0",
        "schedule.min_lr=0",
    ]
    grid = 8 * max(1, getattr(family, "unit", 1) // 2)
    changes += [f"data.image_size={grid * PATCH}", f"data.eval_image_size={grid * PATCH}"]
    if family.encoder.kind == "vit":
        changes += ["family.encoder.size=tiny", "family.encoder.depth=3", f"family.encoder.patch_size={PATCH}"]
    else:
        changes += ["family.encoder.width=8"]
    if hasattr(family, "predictor"):
        changes += ["family.predictor.width=24", "family.predictor.depth=1", "family.predictor.heads=2"]
    if getattr(family, "projector", None) is not None:
        changes += ["family.projector.hidden=32", "family.projector.output=32"]
    if config.data.local is not None:
        changes += [f"data.local.size={4 * PATCH}"]
    return changes


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_trains(name, digits):
    losses = first_losses(recipes.load(name, reduced(name, digits)), STEPS)
    assert len(losses) == len(set(losses)) == STEPS and all(map(math.isfinite, losses))
