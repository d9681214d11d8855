import json
import shutil
import subprocess

import pytest

from datasets_prep.errors import UserError
from jobs import package
from tests.configs import tiny


def checkout(folder):
    """A git checkout with the rooms in it."""
    for room in package.ROOMS:
        shutil.copytree(package._ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.md").write_text("x")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_a_package_is_the_tracked_files_as_they_are_now(tmp_path):
    root = checkout(tmp_path / "repo")
    clean = package.build(tiny(), tmp_path / "a", root)
    assert clean.commit == package.commit(root) and len(clean.commit) == 40
    (root / "service/losses.py").write_text("changed = True\n")
    (root / "service/new.py").write_text("untracked = True\n")
    dirty = package.build(tiny(), tmp_path / "b", root)
    assert (tmp_path / "b/service/losses.py").read_text() == "changed = True\n"
    assert not (tmp_path / "b/service/new.py").exists()
    assert dirty.untracked == ["service/new.py"]
    assert dirty.commit == clean.commit + "+"
    assert dirty.code != clean.code
    assert json.loads((tmp_path / "b/run.json").read_text()) == tiny().plain()


def test_the_code_hash_is_the_same_where_the_package_runs(tmp_path):
    root = checkout(tmp_path / "repo")
    built = package.build(tiny(), tmp_path / "a", root)
    assert package.code_hash(tmp_path / "a") == built.code == package.code_hash(root)
    (root / "README.md").write_text("other words")
    assert package.code_hash(root) == built.code


def test_outside_git_the_rooms_are_packed(tmp_path):
    for room in package.ROOMS:
        shutil.copytree(package._ROOT / room, tmp_path / "lib" / room, ignore=shutil.ignore_patterns("__pycache__"))
    built = package.build(tiny(), tmp_path / "a", tmp_path / "lib")
    assert built.commit is None and built.untracked == []
    assert (tmp_path / "a/jobs/recipes/demo.yaml").exists()


def test_a_package_that_is_too_large_names_its_largest_files(tmp_path):
    root = checkout(tmp_path / "repo")
    with open(root / "service/weights.bin", "wb") as file:
        file.truncate(package.SIZE_LIMIT)
    subprocess.run(["git", "-C", str(root), "add", "-A"], check=True)
    with pytest.raises(UserError, match=r"would be 50\.\d MiB, the limit is 50 MiB.*service/weights.bin"):
        package.build(tiny(), tmp_path / "a", root)
    assert not (tmp_path / "a").exists()


def test_a_run_is_named_by_what_it_computes():
    name = package.run_name(tiny(), "f" * 16, "code")
    assert name.startswith("demo-") and len(name) == len("demo-") + 10
    assert name == package.run_name(tiny("elsewhere/digits"), "f" * 16, "code")
    others = [
        package.run_name(tiny(seed=1), "f" * 16, "code"),
        package.run_name(tiny(repeat=1), "f" * 16, "code"),
        package.run_name(tiny(), "e" * 16, "code"),
        package.run_name(tiny(), "f" * 16, "other"),
    ]
    assert len({name, *others}) == 5


def test_the_name_tells_what_is_computed_and_not_by_how_many():
    name = package.run_name(tiny(), "f" * 16, "code")
    same = {"parallel__workers": 2, "checkpoint__every": "3 steps", "compute__threads": 2, "data__mode": "stream"}
    for key, value in same.items():
        assert package.run_name(tiny(**{key: value}), "f" * 16, "code") == name, key
    others = {"parallel__sync_batchnorm": True, "data__batch_size": 32, "compute__precision": "fp64"}
    for key, value in others.items():
        assert package.run_name(tiny(**{key: value}), "f" * 16, "code") != name, key
