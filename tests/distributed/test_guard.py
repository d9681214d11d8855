"""A NaN in one of two ranks: neither takes the step, and nothing of it remains."""

import logging

import pytest
import torch
from torch.utils import _pytree as pytree

from service.collectives import rank
from service.data.store import Store
from service.engine import loop
from service.engine.checkpoint import Checkpoints
from service.engine.guard import Skips, TrainingFailed
from service.engine.trainer import Length, Trainer
from tests.configs import tiny
from tests.families import family_config
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed
BATCH = 16
CONFIGS = {
    "image_vicreg": ["optim.kind=adamw", "optim.clip_norm=1.0", "eval.weight_ema=0.9"],
    "ijepa": ["family.momentum.start=0.5"],
}


def trainer_of(config):
    torch.manual_seed(config.seed)
    worker = loop.start_worker(config.compute)
    family = loop.place(loop.build_family(config), worker, config.compute, config.parallel)
    return Trainer(config, worker, family, Length(18, 9, 0))


def batch(step):
    generator = torch.Generator().manual_seed(step * 2 + rank())
    images = torch.randint(0, 256, (BATCH // 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.arange(BATCH // 2) + BATCH // 2 * rank()


def after(config, steps, poisoned):
    """State after the steps, and which of them were taken; in the poisoned ones rank 1's batch holds a NaN."""
    trainer, taken = trainer_of(config), []

    def poison(module, arguments):
        views = arguments[0].views.clone()
        views[:, 0, 0, 0, 0] = torch.nan if rank() == 1 and step in poisoned else views[:, 0, 0, 0, 0]
        return (arguments[0]._replace(views=views),)

    trainer.family.register_forward_pre_hook(poison)
    for step in steps:
        trainer.step(step, *batch(step))
        taken.append(trainer.taken)
    return pytree.tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, trainer.state.plain()), taken


def poisoned_and_not(folder):
    found = {}
    for kind, changes in CONFIGS.items():
        config = family_config(kind, *changes, f"data.batch_size={BATCH}", "parallel.workers=2", "schedule.start_lr=0")
        found[kind] = after(config, [0, 1, 2], poisoned={1}), after(config, [0, 2], poisoned=())
    return found, told(folder)


def told(folder):
    """What each rank warns of and raises when rank 1's loss is NaN."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("service.engine.guard").addHandler(handler)
    config = tiny("none", guard__max_skipped_in_a_row=1)
    skips = Skips(config, {}, 0, Checkpoints(Store(folder), config, {}, lambda: None, 0))
    features = torch.zeros(2, BATCH // 2, 3)
    features[1, 5] = torch.nan if rank() == 1 else 0.0
    try:
        skips.take(1, {"encoder": features}, batch(0)[1], None)
    except TrainingFailed as error:
        lines.append(str(error))
    return lines


def test_a_nan_in_one_rank_leaves_no_trace(tmp_path):
    ranks = on_ranks(2, poisoned_and_not, tmp_path)
    for found, lines in ranks:
        for kind, ((state, taken), (expected, all_taken)) in found.items():
            assert taken == [True, False, True] and all_taken == [True, True]
            leaves, wanted = pytree.tree_leaves(state), pytree.tree_leaves(expected)
            assert len(leaves) == len(wanted) > 100
            for leaf, other in zip(leaves, wanted, strict=True):
                assert torch.equal(leaf, other) if torch.is_tensor(leaf) else leaf == other, kind
        assert "1 in a row, guard.max_skipped_in_a_row=1" in lines[-1]
    warned = "step 1 is not taken, its gradient is not finite; samples [13]"
    assert [lines[:-1] for _, lines in ranks] == [[warned], []]
