"""What stays of a run's checkpoints, what storage that fails does to it, and the commands that read them."""

import functools
import json
import math
import threading
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from datasets_prep.errors import UserError
from jobs.cli import cli
from service.data.store import Store, StoreUnavailable
from service.engine import checkpoint, loop
from service.engine.checkpoint import Checkpoints
from tests.configs import tiny
from tests.unit.test_engine import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "data__batch_size": 16,
    "family__encoder__width": 2,
    "family__encoder__depth": 8,
    "family__projector__hidden": 8,
    "family__projector__output": 8,
}


def opened(folder, lease=1, **options):
    """Checkpoints in a folder, and a state to save there."""
    config = tiny(
        "none", **SMALL, optim__kind="sgd", **{f"checkpoint__{name}": value for name, value in options.items()}
    )
    return Checkpoints(Store(folder), config, {}, lambda: None, lease), make_trainer(config).state


def steps(folder):
    return [int(name.split("-")[1]) for name in checkpoint.committed(Store(folder))]


def test_the_last_and_the_best_stay(tmp_path):
    checkpoints, state = opened(tmp_path, keep_last=2, keep_best=2)
    for step, score in enumerate((50.0, 90.0, 60.0, None, 55.0, 40.0), 1):
        checkpoints.score = score
        checkpoints.save(step, state)
    checkpoints.wait()
    assert steps(tmp_path) == [2, 3, 5, 6]
    again, state = opened(tmp_path)
    assert again.restore(state) == 6 and again.score == 40.0


def test_what_killed_writers_left_is_removed_but_not_what_a_newer_driver_writes(tmp_path):
    store = Store(tmp_path)
    for folder in ("step-00000009-lease-0001", "step-00000001-lease-0002", "step-00000003-lease-0003"):
        store.put(f"{folder}/__0_0.distcp", b"torn")
    checkpoints, state = opened(tmp_path, lease=2)
    assert checkpoints.restore(state) == 0
    assert checkpoint.listed(store)[1] == ["step-00000001-lease-0002", "step-00000003-lease-0003"]
    checkpoints.save(2, state)
    checkpoints.wait()
    assert checkpoint.listed(store)[1] == ["step-00000003-lease-0003"]
    assert checkpoint.committed(store) == ["step-00000002-lease-0002"]


def test_training_goes_on_while_storage_fails_and_commits_once_it_is_back(few_digits, tmp_path, caplog):
    config = tiny(few_digits, **SMALL, schedule__steps=6, checkpoint__every="1 steps")
    blocker = tmp_path / "checkpoints"
    blocker.touch()  # a file where the folder should be: no write can succeed

    def back(step, row):
        if step == 5:
            blocker.unlink(missing_ok=True)

    result = loop.train(config, loop.Run(Store(tmp_path)), rows=back)
    assert result["steps"] == 6 and steps(blocker)[-1] == 6
    assert "the checkpoint of step 1 is not written yet" in caplog.text
    caplog.clear()
    impatient = tiny(
        few_digits, **SMALL, schedule__steps=6, checkpoint__every="1 steps", checkpoint__patience_minutes=0
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").touch()
    with pytest.raises(StoreUnavailable, match="checkpoints"):
        loop.train(impatient, loop.Run(Store(tmp_path / "other")))


def test_training_does_not_wait_for_storage_that_does_not_answer(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_LATE_SECONDS", 0)
    config = tiny(few_digits, **SMALL, schedule__steps=6, checkpoint__every="2 steps")
    answers = threading.Event()

    def rows(step, row):
        if step == 5:  # the checkpoint of step 4 is due by then, and that of step 2 not written
            answers.set()

    def flush():
        assert answers.wait(20), "training waits for the write"

    result = loop.train(config, loop.Run(Store(tmp_path)), rows=rows, flush=flush)
    assert result["steps"] == 6 and steps(tmp_path / "checkpoints")[-1] == 6


def test_a_full_disk_loses_no_committed_checkpoint(small_disk, caplog):
    checkpoints, state = opened(small_disk, keep_last=1)
    checkpoints.save(1, state)
    checkpoints.wait()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    checkpoints.save(2, state)
    while "step 2 is not written yet" not in caplog.text:
        time.sleep(0.1)
    assert "No space left" in caplog.text and checkpoint.listed(Store(small_disk))[1] == []
    assert steps(small_disk) == [1] and checkpoint.faults(Store(small_disk), "step-00000001-lease-0001") == []
    filler.unlink()
    checkpoints.wait()
    assert steps(small_disk) == [2] and checkpoint.listed(Store(small_disk))[1] == []


@pytest.mark.timeout(60)
def test_a_run_that_fails_does_not_wait_for_storage(few_digits, tmp_path, monkeypatch):
    config = tiny(few_digits, **SMALL, schedule__steps=6, checkpoint__every="1 steps")
    (tmp_path / "checkpoints").touch()  # with checkpoint.patience_minutes=10 a write would be tried for so long
    made = []
    monkeypatch.setattr(loop, "Checkpoints", lambda *args: made.append(Checkpoints(*args)) or made[0])

    def fail(step, row):
        if step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop.train(config, loop.Run(Store(tmp_path)), rows=fail)
    made[0].wait()  # as the end of the process does; within the write in hand, and no other


class Stop:
    """Asks a run to stop after a number of steps."""

    def __init__(self, after):
        self.asked, self.after = 0, after

    def __call__(self):
        self.asked += 1
        return self.asked >= self.after


@pytest.mark.parametrize("on_stop", [True, False])
def test_a_run_that_is_asked_to_stop_commits_its_steps_first(few_digits, tmp_path, on_stop):
    config = tiny(few_digits, **SMALL, schedule__steps=6, checkpoint__on_stop=on_stop, checkpoint__every="2 steps")
    with pytest.raises(loop.Interrupted, match="stopped after step 3 of 6"):
        loop.train(config, loop.Run(Store(tmp_path)), stop_requested=Stop(3))
    assert steps(tmp_path / "checkpoints") == ([2, 3] if on_stop else [2])
    assert not (tmp_path / "result.json").exists()
    assert loop.train(config, loop.Run(Store(tmp_path)))["resumed_from"] == (3 if on_stop else 2)


def test_minutes_pass_by_the_clock(few_digits, tmp_path, monkeypatch):
    options = {"checkpoint__every": "0.5 minutes", "checkpoint__snapshot_every": "1 minutes", "schedule__steps": 7}
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "_LATE_SECONDS", math.inf)  # by the same clock

    def pass_time(step, row):
        clock[0] += 16.0

    config = tiny(few_digits, **SMALL, **options, checkpoint__keep_last=9, monitor__every="null")
    loop.train(config, loop.Run(Store(tmp_path)), rows=pass_time)
    assert steps(tmp_path / "checkpoints") == [2, 4, 6, 7]
    assert Store(tmp_path).list("snapshots") == ["snapshots/step-00000004.safetensors"]


def changed(config, **changes):
    """Another config in the settings named, `__` for the dot."""
    tree = config.plain()
    for name, value in changes.items():
        *path, last = name.split("__")
        functools.reduce(dict.__getitem__, path, tree)[last] = value
    return type(config).model_validate(tree)


def test_another_config_is_refused_unless_the_change_is_allowed(tmp_path):
    checkpoints, state = opened(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    lr = checkpoints.config.optim.lr
    other = {"optim__lr": lr / 2, "schedule__epochs": 3.0, "name": "other", "compute__threads": 1, "repeat": 5}

    def resumed(**changes):
        config = changed(checkpoints.config, **changes)
        return Checkpoints(checkpoints.store, config, {}, lambda: None, 1).restore(state)

    refused = (
        f"optim.lr was {lr}, is {lr / 2}, schedule.epochs was 1.0, is 3.0; .*allow_changes=.schedule.epo, optim.lr"
    )
    with pytest.raises(UserError, match=refused):
        resumed(**other, checkpoint__allow_changes=["schedule.epo"])
    with pytest.raises(UserError, match="step 1 is of another config: optim.lr was [0-9.]+, is [0-9.]+; set"):
        resumed(**other, checkpoint__allow_changes=["schedule"])
    assert resumed(**other, checkpoint__allow_changes=["schedule", "optim.lr"]) == 1
    assert resumed(name="other", compute__threads=1, repeat=5) == 1
    with pytest.raises(UserError, match="does not fit the changed config .*Size mismatch"):
        wider = changed(checkpoints.config, family__encoder__width=4, checkpoint__allow_changes=["family"])
        Checkpoints(checkpoints.store, wider, {}, lambda: None, 1).restore(make_trainer(wider).state)


def test_a_config_that_is_no_longer_read_is_refused(trained, tmp_path):
    for name in Store(trained).list("checkpoints"):
        Store(tmp_path).put(name, Store(trained).get(name))
    for path in tmp_path.rglob("COMMIT.json"):
        marker = json.loads(path.read_text())
        marker["config"]["optim"]["gone"] = 1
        path.write_text(json.dumps(marker))
    done = CliRunner().invoke(cli, ["checkpoints", "export", str(tmp_path), "--out", str(tmp_path / "new")])
    assert isinstance(done.exception, UserError) and "step 4 has a config that this version cannot read" in str(
        done.exception
    )


def test_an_optimiser_that_took_no_step_yet_is_kept_too(tmp_path):
    checkpoints, state = opened(tmp_path)
    for parameter in state.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    checkpoints.save(1, state)
    checkpoints.wait()
    again, other = opened(tmp_path)
    assert again.restore(other) == 1


def test_a_marker_that_broke_is_fallen_back_from(tmp_path, caplog):
    checkpoints, state = opened(tmp_path, keep_best=1)
    for step in (1, 2):
        checkpoints.save(step, state)
        checkpoints.wait()
    marker = tmp_path / "step-00000002-lease-0001/COMMIT.json"
    marker.write_text(marker.read_text()[:-9])
    assert "COMMIT.json is no JSON" in call("verify", tmp_path, code=1)
    for arguments in (["list", tmp_path], ["export", tmp_path, "--out", tmp_path / "new"]):
        done = CliRunner().invoke(cli, ["checkpoints", *map(str, arguments)])
        assert isinstance(done.exception, UserError) and "is no JSON: " in str(done.exception)
    again, state = opened(tmp_path, keep_best=1)
    assert again.restore(state) == 1 and steps(tmp_path) == [1]
    assert "COMMIT.json is no JSON): removed, falling back to the one before" in caplog.text


def test_another_format_is_refused_by_name(tmp_path):
    checkpoints, state = opened(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    (marker,) = tmp_path.glob("*/COMMIT.json")
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 1}))
    with pytest.raises(UserError, match="has format 1, and this version reads 2.*--new"):
        opened(tmp_path)[0].restore(state)


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory):
    """A finished run whose evaluated encoder is an average of weights."""
    folder = tmp_path_factory.mktemp("run")
    options = {"schedule__steps": 4, "checkpoint__every": "2 steps", "eval__every": "2 steps", "eval__weight_ema": 0.5}
    config = tiny(few_digits, **SMALL, **options)
    loop.train(config, loop.Run(Store(folder)))
    return folder


def call(*arguments, code=0):
    done = CliRunner().invoke(cli, ["checkpoints", *map(str, arguments)])
    assert done.exit_code == code and (code or not done.exception), done.output
    return done.output


def test_list_and_verify(trained, tmp_path):
    shown = json.loads(call("list", trained, "--json"))
    assert [(row["step"], row["val_linear"] is None) for row in shown["committed"]] == [(2, False), (4, False)]
    assert "step-00000002-lease-0000" in call("list", trained / "checkpoints") and shown["torn"] == []
    assert json.loads(call("verify", trained, "--json"))["faults"] == {
        "step-00000002-lease-0000": [],
        "step-00000004-lease-0000": [],
    }
    copy = tmp_path / "checkpoints"
    for name in Store(trained).list("checkpoints"):
        Store(tmp_path).put(name, Store(trained).get(name))
    first, second = (next(copy.glob(f"step-0000000{step}*/*.distcp")) for step in (2, 4))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.unlink()
    (copy / "step-00000004-lease-0000/COMMIT.json").rename(copy / "kept")
    assert "torn: never committed" in call("list", tmp_path)
    (copy / "kept").rename(copy / "step-00000004-lease-0000/COMMIT.json")
    out = call("verify", tmp_path, code=1)
    assert f"{first.parent.name}/{first.name} has" in out and f"{second.parent.name}/{second.name} is missing" in out


def test_an_exported_encoder_is_the_evaluated_one_and_can_be_started_from(trained, few_digits, tmp_path):
    assert "the encoder of step 4" in call("export", trained, "--out", tmp_path / "new")
    exported, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path / "new", trained / "encoder"))
    assert exported.keys() == kept.keys() and all(torch.equal(exported[name], kept[name]) for name in kept)
    for name in ("config.json", "preprocessing.json"):
        assert (tmp_path / "new" / name).read_text() == (trained / "encoder" / name).read_text()
    call("export", trained, "--out", tmp_path / "older", "--step", 2)
    older = load_file(tmp_path / "older/model.safetensors")
    assert not all(torch.equal(older[name], kept[name]) for name in kept)
    config = tiny(few_digits, **SMALL).model_copy(update={"init_from": str(tmp_path / "older")})
    begun = loop.build_family(config).encoder.state_dict()
    assert all(torch.equal(begun[name], older[name]) for name in older)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "{empty}"], "holds no checkpoints: give the folder or address of one run"),
        (["export", "{run}", "--out", "{new}", "--step", "3"], "--step 3: .* has a checkpoint of the steps 2, 4 only"),
        (["export", "{run}", "--out", "{run}"], "is not empty: name a new folder"),
    ],
)
def test_bad_input(trained, tmp_path, arguments, message):
    places = {"empty": tmp_path / "empty", "run": trained, "new": tmp_path / "new"}
    done = CliRunner().invoke(cli, ["checkpoints", *(each.format(**places) for each in arguments)])
    assert isinstance(done.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise done.exception
    assert not (tmp_path / "new").exists()
