"""What a population's clone starts from: weights and optimiser of another run, really."""

import pytest
import torch

from datasets_prep.errors import UserError
from jobs import sweep, trial
from jobs.plan import make
from service.data.store import Store
from service.engine import loop
from service.engine.checkpoint import committed, step_and_lease
from tests.configs import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"family__encoder__width": 2, "family__encoder__depth": 8, "schedule__steps": 6, "eval__report": "false"}
CLONED = {"optim__lr": 0.003, "checkpoint__allow_changes": "[optim.lr]"}


@pytest.fixture(scope="module")
def donor(few_digits, tmp_path_factory):
    """Storage of runs, one of which has checkpoints after steps 2 and 4 and was stopped there."""
    root = Store(tmp_path_factory.mktemp("runs"))
    asked = iter([False, False, False, True])
    config = make(tiny(few_digits, **SMALL, checkpoint__every="2 steps")).config
    with pytest.raises(loop.Interrupted):
        loop.train(config, loop.Run(root.sub("donor"), 3), stop_requested=lambda: next(asked))
    return root


def state_of(run):
    """Model and optimiser of a run's newest checkpoint, as plain tensors."""
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    from service.engine import checkpoint

    store = run.sub("checkpoints")
    folder = committed(store)[-1]
    marker = checkpoint.read_marker(store, folder)
    name = next(name for name in marker["files"] if name.endswith(".metadata"))
    metadata = store.get(f"{folder}/{name}")
    files = {f"{folder}/{each}": described for each, described in marker["files"].items()}
    reader = torch.distributed.checkpoint.FileSystemReader(".")
    reader.fs = checkpoint._Files(store, f"{folder}/{name.removesuffix('.metadata')}", files, metadata)
    return _load_state_dict_from_keys({"model", "optimizer"}, storage_reader=reader)


@pytest.mark.filterwarnings("ignore:torch.distributed is un")
def test_a_clone_has_the_donors_weights_and_optimiser_and_goes_on_with_its_own_rate(donor, few_digits):
    assert trial.clone(donor, trial.Origin("donor", 2), donor.sub("early")) == 2
    assert trial.clone(donor, trial.Origin("donor", 3), donor.sub("clone")) == 4
    theirs, mine = state_of(donor.sub("donor")), state_of(donor.sub("clone"))
    flat = [torch.utils._pytree.tree_flatten(tree)[0] for tree in (theirs, mine)]
    tensors = [(a, b) for a, b in zip(*flat, strict=True) if isinstance(a, torch.Tensor)]
    assert len(tensors) > 40 and all(torch.equal(a, b) for a, b in tensors)
    assert any("exp_avg" in str(key) and value.abs().sum() > 0 for key, value in _named(mine["optimizer"]))

    rows = {}
    config = make(tiny(few_digits, **SMALL, **CLONED)).config
    result = loop.train(
        config, loop.Run(donor.sub("clone"), 1), lambda step, row: rows.setdefault(step, {}).update(row)
    )
    assert result["resumed_from"] == 4 and set(rows) == {5, 6} and 0 < rows[5]["lr"] < 0.003
    assert set(result) >= {"val_linear", "val_linear_se"} and "scores" not in result
    assert rows[6]["val_linear"] == result["val_linear"]
    assert [step_and_lease(folder)[0] for folder in committed(donor.sub("donor/checkpoints"))] == [2, 4]  # untouched


def _named(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value


def test_a_run_without_checkpoint_is_no_origin(donor):
    with pytest.raises(UserError, match="has no checkpoint to clone"):
        trial.clone(donor, trial.Origin("nobody", 1), donor.sub("other"))


def test_the_same_point_from_the_same_origin_is_the_same_run(few_digits):
    settings = sweep.Sweep(name="s", recipe="demo", space={"optim.lr": sweep.Choice(values=(1e-3,))}, trials=1)
    made = make(tiny(few_digits, **SMALL))
    names = [
        trial.run_name(settings, made, origin)
        for origin in (None, trial.Origin("s/a", 4), trial.Origin("s/a", 6), trial.Origin("s/a", 4))
    ]
    assert names[1] == names[3] and len(set(names)) == 3 and all(name.startswith("s/demo-") for name in names)
