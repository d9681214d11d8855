"""The loop in one process on real data: resume, fencing, guards, what it keeps."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

from datasets_prep.errors import UserError
from service.data.split import DataSplit, read_index
from service.data.store import Store, StoreUnavailable
from service.engine import checkpoint, loop
from service.engine.lease import Lease, LeaseLost
from service.engine.trainer import Length, Trainer
from tests.configs import tiny
from tests.servers import free_ports

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Stands for a death between two steps."""


def run(config, folder, *, die_after=None, lease_epoch=0):
    """Train and return the rows; `die_after` ends the run after that step's row."""
    rows = {}

    def take(step, row):
        rows.setdefault(step, {}).update(row)
        if step == die_after:
            raise Killed

    try:
        result = loop.train(config, loop.Run(Store(folder), lease_epoch), rows=take)
    except Killed:
        result = None
    return rows, result


def losses(rows):
    return {step: row["loss"] for step, row in rows.items() if "loss" in row}


def wait_for(path):
    """Wait for what the dead run's background writer was still writing."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


GROUP = {"family__encoder__norm": "group", "family__projector__norm": "layer"}
SMALL = {"data__batch_size": 16, "family__encoder__width": 4, "family__encoder__depth": 8}  # fp16 is slow on CPUs


DECAYS = {"optim__layer_decay": 0.8, "optim__weight_decay_of.projector": 0.1, "schedule__weight_decay_end": 0.2}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__kind": "adamw", **DECAYS},
        {"optim__kind": "lars"},
        {"optim__kind": "lamb", **DECAYS},
        {"optim__kind": "sgd"},
        {**GROUP, **SMALL, "parallel__micro_batch": 8, "compute__precision": "fp16", "optim__clip_norm": 1.0},
    ],
    ids=["adamw", "lars", "lamb", "sgd", "accumulated-fp16"],
)
def test_n_plus_n_steps_are_bitwise_2n(few_digits, tmp_path, changes):
    options = {**changes, "schedule__start_lr": 0.0, "compute__deterministic": True}
    config = tiny(few_digits, **options, schedule__steps=12, eval__weight_ema=0.9, checkpoint__every="5 steps")
    whole, result = run(config, tmp_path / "whole")
    before, nothing = run(config, tmp_path / "cut", die_after=8)
    wait_for(tmp_path / "cut/checkpoints/step-00000005-lease-0000/COMMIT.json")
    after, resumed = run(config, tmp_path / "cut")
    assert nothing is None and resumed["resumed_from"] == 5
    assert losses(before) == {step: loss for step, loss in losses(whole).items() if step <= 8}
    assert losses(after) == {step: loss for step, loss in losses(whole).items() if step > 5}
    assert result["scores"] == resumed["scores"]
    weights = [load(Store(tmp_path / name).get("encoder/model.safetensors")) for name in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_options_of_the_optimiser_act(few_digits, tmp_path):
    base = {"schedule__warmup_epochs": 0, "schedule__steps": 9, "optim__kind": "sgd"}
    options = {
        "optim__layer_decay": 0.5,
        "optim__weight_decay_of.encoder": 9,
        "schedule__weight_decay_end": 9,
        "optim__clip_norm": 1e-3,
    }
    plain = losses(run(tiny(few_digits, **base), tmp_path / "plain", die_after=3)[0])
    for name, value in options.items():
        changed = losses(run(tiny(few_digits, **base, **{name: value}), tmp_path / name, die_after=3)[0])
        assert plain[1] == changed[1] and plain[3] != changed[3], name


def test_rates_are_logged(few_digits, tmp_path):
    decay = {"optim__weight_decay": 0.1, "schedule__weight_decay_end": 0.5}
    rows, _ = run(tiny(few_digits, schedule__steps=4, schedule__warmup_epochs=0, **decay), tmp_path, die_after=4)
    logged = [[rows[step][name] for step in (1, 2, 3, 4)] for name in ("lr", "weight_decay")]
    shares = [(1 + math.cos(math.pi * progress / 4)) / 2 for progress in range(4)]  # each of the step just taken
    assert logged[0] == pytest.approx([0.01 * share for share in shares])
    assert logged[1] == pytest.approx([0.5 - 0.4 * share for share in shares])


def make_trainer(config, steps=3):
    torch.manual_seed(config.seed)
    worker = loop.start_worker(config.compute)
    family = loop.place(loop.build_family(config), worker, config.compute, config.parallel)
    return Trainer(config, worker, family, Length(18, steps, 0))


def a_batch(size):
    return torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8), torch.arange(size)


def weights_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_step_that_overflows_fp16_is_not_taken():
    changes = {"data__batch_size": 8, "schedule__start_lr": 1e-3, "compute__precision": "fp16"}
    trainer = make_trainer(tiny("none", **changes, eval__weight_ema=0.5))
    after = []
    trainer.family.after_step = after.append
    start, state = weights_of(trainer.module), trainer.scaler.state_dict()
    trainer.scaler.load_state_dict(state | {"scale": 2.0**100})
    losses = trainer.step(0, *a_batch(8))
    assert torch.isfinite(losses.total) and trainer.scaler.get_scale() == 2.0**99
    assert torch.equal(weights_of(trainer.module), start) and after == []
    assert torch.equal(weights_of(trainer.averaged.module), weights_of(trainer.family.encoder))
    trainer.scaler.load_state_dict(state | {"scale": 2.0**10})
    trainer.step(1, *a_batch(8))
    assert trainer.scaler.get_scale() == 2.0**10 and after == [2 / 3]
    assert not torch.equal(weights_of(trainer.module), start)
    assert not torch.equal(weights_of(trainer.averaged.module), weights_of(trainer.family.encoder))


def test_fp16_clips_the_unscaled_gradient():
    """After plain SGD the move is lr × the clipped norm, whatever the loss was multiplied by."""
    changes = {"data__batch_size": 8, "optim__kind": "sgd", "optim__momentum": 0, "optim__weight_decay": 0}
    changes |= {"optim__lr": 0.5, "optim__clip_norm": 1e-3, "schedule__start_lr": 0.5, "compute__precision": "fp16"}
    trainer = make_trainer(tiny("none", **changes))
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 64.0})
    start = weights_of(trainer.module)
    trainer.step(0, *a_batch(8))
    moved = (weights_of(trainer.module) - start).norm()
    assert moved.item() == pytest.approx(0.5 * 1e-3, rel=1e-2)


def test_micro_batches_of_a_run_change_nothing(few_digits, tmp_path):
    options = {**GROUP, "schedule__steps": 4, "compute__precision": "fp64", "eval__weight_ema": 0.5}
    rows, kept = [], []
    for size in ("null", 16):
        folder = tmp_path / str(size)
        rows.append(losses(run(tiny(few_digits, **options, parallel__micro_batch=size), folder)[0]))
        kept.append(load(Store(folder).get("encoder/model.safetensors")))
    assert rows[1] == pytest.approx(rows[0], rel=1e-9) and len(rows[0]) == 4
    for name, tensor in kept[0].items():
        torch.testing.assert_close(kept[1][name], tensor, rtol=1e-7, atol=1e-9)


def test_the_loss_scale_is_logged_where_there_is_one(few_digits, tmp_path):
    for precision in ("fp16", "fp32"):
        rows, _ = run(tiny(few_digits, schedule__steps=1, compute__precision=precision), tmp_path / precision)
        assert ("loss_scale" in rows[1]) == (precision == "fp16")


def test_streaming_gives_the_losses_of_resident_data(few_digits, tmp_path):
    resident, _ = run(tiny(few_digits, data__mode="resident", schedule__steps=4), tmp_path / "a")
    streamed, _ = run(tiny(few_digits, data__mode="stream", schedule__steps=4), tmp_path / "b")
    assert losses(resident) == losses(streamed)


def test_a_checkpoint_returns_every_tensor(few_digits, tmp_path):
    config = tiny(
        few_digits, schedule__steps=3, eval__weight_ema=0.5, checkpoint__every="1 steps", checkpoint__keep_last=2
    )
    run(config, tmp_path)
    store = Store(tmp_path / "checkpoints")
    checkpoints = checkpoint.Checkpoints(store, config, {}, lambda: None, 0)
    assert checkpoint.committed(store) == ["step-00000002-lease-0000", "step-00000003-lease-0000"]
    assert checkpoints.newest_step() == 3
    trainers = [make_trainer(config.model_copy(update={"seed": seed})) for seed in range(2)]
    assert [checkpoints.restore(t.state) for t in trainers] == [3, 3]
    plain = [t.state.plain() for t in trainers]
    leaves = [torch.utils._pytree.tree_leaves(p) for p in plain]
    assert len(leaves[0]) == len(leaves[1]) > 100
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert plain[0]["optimizer"]["state"]["encoder.conv1.weight"]["step"] == 3


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(few_digits, tmp_path, caplog):
    config = tiny(few_digits, schedule__steps=6, checkpoint__every="2 steps", checkpoint__keep_last=3)
    whole, _ = run(config, tmp_path / "whole")
    run(config, tmp_path / "cut", die_after=5)
    newest = tmp_path / "cut/checkpoints/step-00000004-lease-0000"
    wait_for(newest / "COMMIT.json")
    victim = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    victim.write_bytes(victim.read_bytes()[:-1])
    after, result = run(config, tmp_path / "cut")
    assert result["resumed_from"] == 2
    assert losses(after) == {step: loss for step, loss in losses(whole).items() if step > 2}
    assert f"checkpoint {newest.name} is unusable" in caplog.text and victim.name in caplog.text
    check_goodput(result["goodput"], after[6])


def check_goodput(found, row):
    """Of a run that died after five steps and went on from the second."""
    assert (found["steps"], found["lost_steps"], found["outcome"]) == (6, 3, "finished")
    assert [(each["cause"], each["step"], each["lost_steps"]) for each in found["restarts"]] == [("Killed", 2, 3)]
    assert set(found["seconds"]) == {"step", "lost", "data", "evaluate", "checkpoint", "start", "restore", "down"}
    assert min(found["seconds"].values()) >= 0 and found["seconds"]["lost"] > 0
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"])
    assert {"goodput": found["goodput"], "lost_steps": 3, "restarts": 1}.items() <= row.items()


def test_a_torn_checkpoint_does_not_count(few_digits, tmp_path):
    config = tiny(few_digits, schedule__steps=6, checkpoint__every="2 steps")
    run(config, tmp_path, die_after=5)
    marker = tmp_path / "checkpoints/step-00000004-lease-0000/COMMIT.json"
    wait_for(marker)
    marker.unlink()
    assert run(config, tmp_path)[1]["resumed_from"] == 2


def test_a_fenced_driver_never_commits(few_digits, tmp_path):
    store = Store(tmp_path)
    with Lease(store) as first:
        pass
    with Lease(store) as second:
        assert (first.epoch, second.epoch) == (1, 2)
        with pytest.raises(LeaseLost, match="lease epoch 2 is newer than this driver's 1"):
            run(tiny(few_digits, schedule__steps=2), tmp_path, lease_epoch=first.epoch)
        assert store.list("checkpoints") == [n for n in store.list("checkpoints") if not n.endswith("COMMIT.json")]
        assert not store.exists("result.json")
        assert run(tiny(few_digits, schedule__steps=2), tmp_path, lease_epoch=second.epoch)[1]["steps"] == 2


def test_a_loss_that_is_no_number_stops_the_run_with_a_cure(few_digits, tmp_path):
    config = tiny(few_digits, optim__kind="sgd", optim__lr=1e18, schedule__warmup_epochs=0, schedule__steps=8)
    with pytest.raises(loop.TrainingFailed, match="lower optim.lr.*last good checkpoint is of step 0"):
        run(config, tmp_path)
    assert not any(name.endswith("COMMIT.json") for name in Store(tmp_path).list("checkpoints"))


def test_the_kept_encoder_is_the_average_of_the_weights(few_digits, tmp_path):
    name, decay = "conv1.weight", 0.75
    config = tiny(few_digits, schedule__steps=3, checkpoint__snapshot_every="1 steps")
    torch.manual_seed(config.seed)
    averaged = loop.build_family(config).encoder.state_dict()[name]
    run(config, tmp_path / "plain")
    for step in (1, 2, 3):
        weights = load(Store(tmp_path / "plain").get(f"snapshots/step-{step:08d}.safetensors"))[name]
        averaged = decay * averaged + (1 - decay) * weights
    run(tiny(few_digits, schedule__steps=3, eval__weight_ema=decay), tmp_path / "ema")
    got = load(Store(tmp_path / "ema").get("encoder/model.safetensors"))[name]
    torch.testing.assert_close(got, averaged, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(got, weights, rtol=1e-3)


def test_another_environment_is_told(few_digits, tmp_path, caplog):
    config = tiny(few_digits, schedule__steps=4, checkpoint__every="2 steps")
    run(config, tmp_path, die_after=3)
    wait_for(tmp_path / "checkpoints/step-00000002-lease-0000/COMMIT.json")
    torch.set_num_threads(2)
    run(config.model_copy(update={"compute": config.compute.model_copy(update={"threads": 2})}), tmp_path, die_after=3)
    assert "threads was 1, is 2" in caplog.text and "not bitwise" in caplog.text


def test_what_a_run_keeps(few_digits, tmp_path):
    config = tiny(
        few_digits,
        schedule__steps=6,
        eval__every="3 steps",
        checkpoint__snapshot_every="3 steps",
        eval__labels_per_class=[1],
    )
    rows, result = run(config, tmp_path)
    store = Store(tmp_path)
    assert store.list("snapshots") == ["snapshots/step-00000003.safetensors", "snapshots/step-00000006.safetensors"]
    assert "val_linear" in rows[3]
    assert json.loads(store.get("result.json")) == result
    assert set(result["scores"]) == {"raw_pixels", "random_encoder", "trained"}
    assert set(result["scores"]["trained"]) == {"1", "all", "knn"}
    assert result["reported_split"] == "test"
    assert set(result["quality"]) == set(result["scores"])
    described = json.loads(store.get("encoder/preprocessing.json"))
    assert described["resize"] == [16, 16] and described["output"]["shape"] == [-1, 64]


def test_an_encoder_is_evaluated_and_served_at_its_own_size(few_digits, tmp_path):
    scores = {}
    for side in (16, 24):
        config = tiny(few_digits, schedule__steps=2, data__eval_image_size=side, family__encoder__depth=8)
        _, result = run(config, tmp_path / str(side))
        described = json.loads(Store(tmp_path / str(side)).get("encoder/preprocessing.json"))
        assert described["resize"] == [side, side] and result["protocol"].endswith(f"{side}px")
        scores[side] = result["scores"]
    assert scores[16] != scores[24]


def test_all_bad_samples_are_named_at_once(digits, tmp_path):
    index = read_index(Store(digits))
    split = DataSplit(Store(digits), index, "val")
    opened = split.open_shard(split.rows.shards[0])
    tar = bytearray(opened.tar)
    for row in opened.rows[:7]:
        tar[int(row["offset"][0]) : int(row["offset"][0]) + 8] = b"no image"
    from service.data import resident

    class Broken(DataSplit):
        def open_shard(self, shard):
            return replace(opened, tar=memoryview(tar))

    with pytest.raises(UserError, match="7 samples cannot be decoded") as error:
        resident.decode_split(Broken(split.store, index, "val"), 16, 2)
    named = [line for line in str(error.value).splitlines() if "no known image format" in line]
    broken = {row["key"].decode() for row in opened.rows[:7]}
    assert len(named) == 5 and all(line.split("'")[1] in broken for line in named)


def test_training_waits_for_its_data_until_the_deadline(monkeypatch, tmp_path):
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(StoreUnavailable, match="s3://data/digits/index.json: the store failed for 0.6 s"):
        loop.train(tiny("s3://data/digits", data__deadline_minutes=0.01), loop.Run(Store(tmp_path)))
