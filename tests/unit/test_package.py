import json
import os
import shutil
import subprocess
import zipfile
from importlib.metadata import version

import pytest

from cluster.credentials import check_address, check_file, own_secrets
from datasets_prep.errors import UserError
from jobs import package, recipes
from tests.configs import tiny


def checkout(folder):
    """A git checkout with the rooms in it."""
    for room in package.ROOMS:
        shutil.copytree(package.ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.md").write_text("x")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return folder


def commit_all(root):
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)


def pack(root, folder, config=None):
    """The package of a checkout, and where it was unpacked."""
    folder.mkdir()
    code = package.collect(root)
    built = package.write(code, package.config_document(config or tiny()), folder / "package.zip")
    with zipfile.ZipFile(built.path) as archive:
        archive.extractall(folder / "unpacked")
    return code, built, folder / "unpacked"


def test_a_package_is_the_tracked_files_as_they_are_now(tmp_path):
    root = checkout(tmp_path / "repo")
    clean, _, unpacked = pack(root, tmp_path / "a")
    assert clean.commit == package.commit(root) and len(clean.commit) == 40
    assert not (unpacked / "changes.patch").exists()
    (root / "service/losses.py").write_text("changed = True\n")
    (root / "service/new.py").write_text("untracked = True\n")
    dirty, _, unpacked = pack(root, tmp_path / "b")
    assert (unpacked / "service/losses.py").read_text() == "changed = True\n"
    assert not (unpacked / "service/new.py").exists()
    assert dirty.untracked == ["service/new.py"]
    assert dirty.commit == clean.commit + "+" and dirty.hash != clean.hash
    assert json.loads((unpacked / "run.json").read_text()) == tiny().plain()


def test_the_patch_of_a_package_leads_from_the_commit_to_what_runs(tmp_path):
    root = checkout(tmp_path / "repo")
    (root / "service/losses.py").write_text("changed = True\n")
    _, _, unpacked = pack(root, tmp_path / "a")
    again = tmp_path / "again"
    subprocess.run(["git", "clone", "-q", str(root), str(again)], check=True)
    subprocess.run(["git", "-C", str(again), "apply", str(unpacked / "changes.patch")], check=True)
    assert (again / "service/losses.py").read_text() == "changed = True\n"


def test_the_same_contents_make_the_same_package(tmp_path):
    root = checkout(tmp_path / "repo")
    _, first, unpacked = pack(root, tmp_path / "a")
    for path in root.rglob("*.py"):
        os.utime(path, (1e9, 1e9))
    _, second, _ = pack(root, tmp_path / "b")
    assert second.sha == first.sha and second.path.read_bytes() == first.path.read_bytes()
    _, other, _ = pack(root, tmp_path / "c", tiny(seed=1))
    assert other.sha != first.sha
    (root / "README.md").chmod(0o755)
    _, executable, _ = pack(root, tmp_path / "d")
    assert executable.sha != first.sha


def test_what_a_package_unpacks_to_makes_the_same_runs(tmp_path):
    root = checkout(tmp_path / "repo")
    code, _, unpacked = pack(root, tmp_path / "a")
    assert package.code_hash(unpacked) == code.hash == package.code_hash(root)
    again = package.collect(unpacked)
    assert (again.hash, again.commit, again.untracked) == (code.hash, code.commit, [])
    (root / "README.md").write_text("other words")
    assert package.code_hash(root) == code.hash


def test_outside_git_the_rooms_and_what_is_installed_are_packed(tmp_path):
    for room in package.ROOMS:
        shutil.copytree(package.ROOT / room, tmp_path / "lib" / room, ignore=shutil.ignore_patterns("__pycache__"))
    code, _, unpacked = pack(tmp_path / "lib", tmp_path / "a")
    assert code.commit is None and code.untracked == []
    assert (unpacked / "jobs/recipes/demo.yaml").exists()
    assert f"ray=={version('ray')}" in (unpacked / "requirements.lock").read_text().splitlines()


def test_a_file_that_is_too_large_is_named(tmp_path):
    root = checkout(tmp_path / "repo")
    with open(root / "service/weights.bin", "wb") as file:
        file.truncate(package.FILE_LIMIT + 1)
    commit_all(root)
    with pytest.raises(UserError, match=r"hold service/weights.bin of 50\.0 MiB, the limit of a file is 50 MiB"):
        package.collect(root)


def test_a_package_that_is_too_large_names_its_largest_files(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "SIZE_LIMIT", 3 << 20)
    root = checkout(tmp_path / "repo")
    (root / "weights.bin").write_bytes(bytes(3 << 20))
    commit_all(root)
    with pytest.raises(UserError, match=r"would be \d\.\d MiB, the limit is 3 MiB: .* the largest are weights.bin"):
        package.collect(root)


AWS_KEY = "AKIA" + "QWERTYUIOPASDFGH"
SECRETS = [
    (".env", "COLOUR=blue", "the package would hold .env, by its name a file of secrets"),
    ("certificates/node.pem", "x", "hold certificates/node.pem, by its name"),
    ("service/store.py", f"x = 1\nkey = '{AWS_KEY}'\n", "an AWS access key, in line 2 of service/store.py"),
    ("notes.txt", "AWS_SECRET_" + "ACCESS_KEY=" + "aB3/" * 10, "an AWS secret key, in line 1 of notes.txt"),
    ("deploy/tls", "-----BEGIN RSA " + "PRIVATE KEY-----\n" + "Ab0+" * 8, "a private key, in line 1 of deploy/tls"),
    ("README.md", "\n\ngh" + "p_" + "a1B2" * 9, "a GitHub token, in line 3 of README.md"),
    ("jobs/x.yaml", "token: hf" + "_" + "a1B2" * 9, "a Hugging Face token"),
    (
        "jobs/own.yaml",
        "password: not-so-secret-word",
        "the value of MLFLOW_TRACKING_PASSWORD, in line 1 of jobs/own.yaml",
    ),
]


@pytest.mark.parametrize(("name", "text", "message"), SECRETS, ids=[name for name, _, _ in SECRETS])
def test_secrets_are_refused_with_their_place_and_the_cure(name, text, message):
    own = own_secrets({"MLFLOW_TRACKING_PASSWORD": "not-so-secret-word", "AWS_SECRET_ACCESS_KEY": "short"})
    with pytest.raises(UserError) as refused:
        check_file(name, text.encode(), own)
    assert message in str(refused.value) and "environment of the cluster's nodes" in str(refused.value)
    assert text.split()[-1] not in str(refused.value)


def test_a_token_file_is_looked_into(tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef\n")
    own = own_secrets({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    with pytest.raises(UserError, match="the value of RAY_AUTH_TOKEN_PATH, in line 2 of jobs/x.py"):
        check_file("jobs/x.py", b"\nx = '0123456789abcdef'", own)


def test_a_secret_that_a_change_took_out_is_still_in_its_patch(tmp_path):
    root = checkout(tmp_path / "repo")
    (root / "README.md").write_text(f"{AWS_KEY}\n")
    commit_all(root)
    (root / "README.md").write_text("clean\n")
    with pytest.raises(UserError, match="AWS access key, in line .* of changes.patch"):
        package.collect(root)


def test_samples_and_examples_are_no_secrets(tmp_path):
    for name, text in [(".env.example", "KEY="), ("a.md", "AKIA" + "IOSFODNN7EXAMPLE"), ("b.md", "BEGIN PRIVATE KEY")]:
        check_file(name, text.encode(), {})


ADDRESSES = [
    ("data.uri=s3://key:verysecret@bucket/digits", "data.uri=s3://bucket/digits was given with a user and password"),
    (
        "data.uri=https://host/x?X-Amz-Signature=verysecret",
        "data.uri=https://host/x was given with the query X-Amz-Sig",
    ),
    ("init_from=https://verysecret@host/w.safetensors", "init_from=https://host/w.safetensors was given with a user"),
    (f"data.uri=s3://bucket/{AWS_KEY}", "data.uri holds an AWS access key"),
]


@pytest.mark.parametrize(("setting", "message"), ADDRESSES)
def test_settings_with_credentials_are_refused_and_not_repeated(setting, message):
    with pytest.raises(UserError) as refused:
        recipes.load("demo", [setting])
    assert message in str(refused.value)
    assert "verysecret" not in str(refused.value) and AWS_KEY not in str(refused.value)


@pytest.mark.parametrize("uri", ["s3://bucket/a", "abfss://container@account.dfs.core.windows.net/a", "/data/a@b:c"])
def test_addresses_without_credentials_pass(uri):
    check_address("data.uri", uri)


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
