"""`compute.compile`: one graph for every step's masks, the same numbers, the same names of the weights."""

import pytest
import torch
from safetensors.torch import load
from torch._dynamo.utils import counters

from service.data.store import Store
from service.engine import loop
from tests.configs import tiny
from tests.families import MANY_VIEWS, family_config, make_family, random_batch

pytestmark = pytest.mark.usefixtures("one_thread")
SHALLOW = ["family.predictor.depth=1", "family.encoder.drop_path=0.2", "family.encoder.depth=2"]
VIT = ["family.encoder={kind: vit, depth: 1}", *MANY_VIEWS]


@pytest.mark.parametrize("kind, changes", [("image_vicreg", VIT), ("ijepa", SHALLOW), ("hjepa", SHALLOW)])
def test_one_graph_serves_every_step(kind, changes):
    torch._dynamo.reset()
    counters.clear()
    config = family_config(kind, *changes)
    family = make_family(config).train()
    batches = [random_batch(family, config, 4, step=step) for step in range(4)]
    expected = [family(batch).total.item() for batch in batches]
    family.embed = torch.compile(family.embed, backend="eager", fullgraph=True)
    graphs = []
    for step, batch in enumerate(batches):
        assert family(batch).total.item() == pytest.approx(expected[step], rel=1e-9)
        family.after_step(0.0)  # moves no weight: none has been trained
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 4
    assert len(set(expected)) == 1 if batches[0].context is None else len(set(expected)) == 4
    assert not any("_orig_mod" in name for name in family.state_dict())


@pytest.mark.slow  # a minute of compiling
def test_a_compiled_run_gives_the_losses_and_names_of_a_plain_one(few_digits, tmp_path):
    weights, losses = [], []
    for compile_ in (False, True):
        config = tiny(few_digits, schedule__steps=3, compute__compile=compile_, compute__precision="fp64")
        run = loop.Run(Store(tmp_path / str(compile_)))
        found = []

        def take(step, row, found=found):
            found.extend(row[name] for name in ("loss",) if name in row)

        loop.train(config, run, rows=take)
        losses.append(found)
        weights.append(load(run.store.get("encoder/model.safetensors")))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and len(losses[0]) == 3
    assert weights[0].keys() == weights[1].keys()
