"""The command line without a cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).parents[2]


def tessera(*arguments, code=0, env=None):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def alone(tmp_path):
    """An environment in which no stack is known."""
    import os

    return os.environ | {"XDG_STATE_HOME": str(tmp_path), "TESSERA_CACHE": str(tmp_path / "cache")}


COMMANDS = [
    "up",
    "down",
    "status",
    "ui",
    "shard",
    "index",
    "verify",
    "inspect",
    "submit",
    "jobs",
    "evaluate",
    "plan",
    "register",
    "sync",
    "report",
    "recipes",
    "config",
]


def test_help_lists_every_command_and_examples():
    text = tessera("--help")
    for command in COMMANDS:
        assert command in text
        assert "Usage:" in tessera(command, "--help")
    assert "tessera submit demo" in text


def test_recipes_and_configs_are_shown():
    assert set(json.loads(tessera("recipes", "--json"))) >= {"demo", "cifar10-cpu", "rapid", "long", "fast"}
    assert "momentum: 0.9" in tessera("config", "show", "rapid")
    assert json.loads(tessera("config", "show", "rapid", "seed=7", "--json"))["seed"] == 7
    assert json.loads(tessera("config", "schema"))["title"] == "RunConfig"


def test_shard_says_what_it_would_do_then_does_it(alone, tmp_path):
    out = tmp_path / "digits"
    planned = json.loads(tessera("shard", "digits", "--out", out, "--dry-run", "--json", env=alone))
    assert planned["samples"] == {"train": 1167, "val": 130, "test": 500} and not out.exists()
    done = json.loads(tessera("shard", "digits", "--out", out, "--json", env=alone))
    assert done["samples"] == planned["samples"] and (out / "index.json").exists()
    assert "452be525ec26c4d3" in tessera("shard", "digits", "--out", out, env=alone)
    assert "--seed" in tessera("shard", "--help")
    assert "different" in tessera("shard", "digits", "--out", out, "--seed", 1, code=2, env=alone)


def test_what_needs_a_stack_says_how_to_start_one(alone):
    for arguments in (["ui"], ["submit", "demo"], ["jobs", "list"], ["evaluate", "models:/demo@champion"]):
        environment = {k: v for k, v in alone.items() if k != "MLFLOW_TRACKING_URI"}
        assert "tessera up" in tessera(*arguments, code=2, env=environment)
    assert "no stack runs" in tessera("down", env=alone)
    tessera("status", code=1, env=alone)


def test_wrong_usage_is_exit_code_2():
    assert "No such command" in tessera("sbmit", code=2)
    assert "No such option" in tessera("up", "--dta", code=2)
    assert "unknown recipe" in tessera("submit", "dmo", code=2)
