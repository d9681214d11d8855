"""Training on shards that are read as a stream: crops from the reader, mixtures, bad samples."""

import json

import pytest
import torch

from datasets_prep.errors import UserError
from jobs import plan, recipes
from service.data.store import Store
from service.engine import loop
from tests.configs import TINY, tiny
from tests.shards import write

SHARDS = {"train": [30, 41, 27, 40], "val": [21], "test": [20, 15]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))


def run(config, folder, stop_after=None):
    """Train; rows by step, and the result unless the run was stopped after a step."""
    rows = {}

    class Stopped(BaseException):
        pass

    def take(step, row):
        rows.setdefault(step, {}).update(row)
        if step == stop_after:
            raise Stopped

    try:
        return rows, loop.train(config, loop.Run(Store(folder)), rows=take)
    except Stopped:
        return rows, None


def losses(rows):
    return {step: row["loss"] for step, row in rows.items() if "loss" in row}


def config_of(folder, **changes):
    fixed = {"data__batch_size": 16, "compute__threads": 1, "compute__deterministic": True}
    return tiny(folder, **fixed | {"checkpoint__every": "2 steps", "schedule__steps": 6} | changes)


@pytest.fixture(autouse=True)
def restore_torch():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def mixture_of(tmp_path, **changes):
    photos, squares = write(tmp_path / "photos", SHARDS), write(tmp_path / "squares", {"train": [40, 9]}, sizes=False)
    sources = {"photos": {"uri": str(photos), "weight": 3}, "squares": {"uri": str(squares)}}
    return config_of(photos, data__mixture=json.dumps(sources), data__steps_per_epoch=4, **changes)


@pytest.mark.parametrize("mixed", [False, True], ids=["one source", "mixture"])
def test_a_run_continues_bitwise(tmp_path, mixed):
    config = mixture_of(tmp_path) if mixed else config_of(write(tmp_path / "photos", SHARDS))
    whole, result = run(config, tmp_path / "whole")
    before, _ = run(config, tmp_path / "cut", stop_after=4)
    while not (tmp_path / "cut/checkpoints/step-00000002-lease-0000/COMMIT.json").exists():
        pass
    after, resumed = run(config, tmp_path / "cut")
    assert resumed["resumed_from"] in (2, 4) and len(set(losses(whole).values())) == 6
    assert losses(before) | losses(after) == losses(whole)
    assert result["scores"] == resumed["scores"]
    assert whole[6]["epoch"] == pytest.approx(6 / 4 if mixed else 6 / 8)


@pytest.mark.parametrize("sizes", [True, False], ids=["stream", "resident"])
def test_local_crops_come_from_either_reader_and_continue_bitwise(tmp_path, sizes):
    folder = write(tmp_path / "photos", SHARDS, sizes=sizes)
    config = config_of(folder, data__local="{count: 2, size: 8}", family__views=3)
    whole, _ = run(config, tmp_path / "whole")
    run(config, tmp_path / "cut", stop_after=4)
    after, resumed = run(config, tmp_path / "cut")
    without, _ = run(config_of(folder, family__views=3), tmp_path / "without")
    assert resumed["resumed_from"] in (0, 2, 4) and len(set(losses(whole).values())) == 6
    assert losses(after).items() <= losses(whole).items()
    assert not set(losses(whole).values()) & set(losses(without).values())


def test_a_mixture_is_planned_and_named_by_all_its_data(tmp_path):
    config = mixture_of(tmp_path)
    made = plan.make(config)
    assert (made.steps_per_epoch, made.config.data.mode) == (4, "stream")
    assert ("mixture", "75.0% photos, 25.0% squares") in made.rows() and made.summary()["samples"] == 187
    assert made.fingerprint != made.index.fingerprint
    other = config.model_copy(update={"data": config.data.model_copy(update={"mixture": {}, "steps_per_epoch": None})})
    assert plan.make(other).fingerprint == made.index.fingerprint


def test_a_weight_can_be_overridden_and_errors_name_the_fix():
    both = ["data.mixture={a: {uri: x}, b: {uri: y, weight: 2}}", "data.steps_per_epoch=9"]
    config = recipes.load("demo", [*TINY, *both, "data.mixture.a.weight=3"])
    assert [(s.uri, s.weight, s.split) for s in config.data.mixture.values()] == [("x", 3, "train"), ("y", 2, "train")]
    for overrides, message in (
        (both[:1], "steps_per_epoch=None with 2 sources in mixture.*give both or neither"),
        (both[1:], "steps_per_epoch=9 with 0 sources"),
        ([*both, "data.mode=resident"], "use mode=stream"),
        ([*both, "data.mixture.b.wait=2"], "data.mixture.b.wait is no setting"),
        ([*both, "data.mixture.b.weight=0"], "data.mixture.b.weight=0: Input should be greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            recipes.load("demo", [*TINY, *overrides])


@pytest.mark.parametrize("sizes", [True, False], ids=["stream", "resident"])
def test_bad_samples_are_counted_in_the_metrics_and_left_out_of_scores(tmp_path, sizes):
    folder = write(tmp_path / "photos", SHARDS, sizes=sizes, bad=(3, 16, 17))
    config = config_of(folder, data__max_bad=3, schedule__steps=8)
    assert plan.make(config).config.data.mode == ("stream" if sizes else "resident")
    rows, result = run(config, tmp_path / "run")
    counts = [rows[step]["bad_samples"] for step in range(1, 9)]
    assert counts == sorted(counts) and 2 <= counts[-1] <= 3
    assert set(result["scores"]) == {"raw_pixels", "random_encoder", "trained"}
    with pytest.raises(UserError, match="cannot be decoded, and data.max_bad=1 allows 1"):
        run(config.model_copy(update={"data": config.data.model_copy(update={"max_bad": 1})}), tmp_path / "strict")


def test_one_bad_sample_more_than_all_ranks_may_meet_stops_the_run():
    loop._check_bad_samples(2, 2)
    with pytest.raises(loop.TrainingFailed, match="3 samples of this epoch cannot be decoded, and data.max_bad=2"):
        loop._check_bad_samples(3, 2)
