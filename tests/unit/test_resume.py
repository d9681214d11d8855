"""Going on with a named run by another config: what is admitted, and under which name."""

import json
from types import SimpleNamespace

import pytest

from datasets_prep.errors import UserError
from jobs import plan, submit, train
from jobs.cli import cli
from service.data.store import Store
from service.engine import loop
from service.engine.lease import Lease
from tests.configs import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"family__encoder__width": 2, "family__encoder__depth": 8, "schedule__steps": 4}


@pytest.fixture(scope="module")
def stopped(few_digits, tmp_path_factory):
    """Storage of runs, one of which was asked to stop after its second step."""
    root = Store(tmp_path_factory.mktemp("runs"))
    made = plan.make(tiny(few_digits, **SMALL))
    run = root.sub("old-name")
    run.put("state.json", json.dumps({"fingerprint": made.index.fingerprint}).encode())
    asked = iter([False, True])
    with pytest.raises(loop.Interrupted):
        loop.train(made.config, loop.Run(run), stop_requested=lambda: next(asked))
    return root


def resume(root, data, **changes):
    made = plan.make(tiny(data, **SMALL, **changes))
    profile = SimpleNamespace(storage_uri=root.uri)
    return made, submit.submit(made, profile, dry_run=True, resume="old-name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim__lr": 0.02}, r"step 2 is of another config: optim.lr was 0.01, is 0.02; .*allow_changes=\[optim.lr\]"),
        ({"seed": 1, "checkpoint__allow_changes": "[optim]"}, "seed was 42, is 1"),
    ],
)
def test_other_changes_are_refused_before_a_job_starts(stopped, few_digits, change, message):
    with pytest.raises(UserError, match=message):
        resume(stopped, few_digits, **change)


def test_runs_that_cannot_go_on(stopped, few_digits, tmp_path):
    run = Store(tmp_path).sub("old-name")
    for name, data, message in [
        (None, None, "there is no run"),
        ("state.json", {"fingerprint": "other"}, "read data of fingerprint other"),
        ("state.json", json.loads(stopped.get("old-name/state.json")), "has no checkpoint to go on from"),
        ("result.json", {}, "has trained: start another run with init_from="),
    ]:
        if name is not None:
            run.put(name, json.dumps(data).encode())
        with pytest.raises(UserError, match=message):
            resume(Store(tmp_path), few_digits)


def test_options_that_do_not_go_together():
    for options in (["--allow-change", "optim.lr"], ["--resume", "old-name", "--new"]):
        with pytest.raises(UserError, match="--allow-change goes with --resume RUN, and --new does not"):
            cli.main(["submit", "demo", *options], standalone_mode=False)


def test_a_run_goes_on_under_its_name_with_what_may_change(stopped, few_digits):
    made, planned = resume(stopped, few_digits, optim__lr=0.02, checkpoint__allow_changes="[optim.lr]")
    assert (planned.run, planned.state) == ("old-name", "planned")
    assert loop.train(made.config, loop.Run(stopped.sub("old-name"), 2))["resumed_from"] == 2


def test_a_driver_takes_the_run_that_it_is_told(stopped, few_digits, monkeypatch):
    monkeypatch.setattr(train, "STANDBY_SECONDS", 0)
    monkeypatch.setenv("TESSERA_RUN", "done")
    run = stopped.sub("done")
    run.put("result.json", json.dumps({"model_uri": "models:/it/1"}).encode())
    with Lease(run):
        assert train.drive(plan.make(tiny(few_digits)), stopped, "http://nobody")["model_uri"] == "models:/it/1"
