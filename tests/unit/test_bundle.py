"""A bundle says truly what it is and needs; that it runs, the submitted jobs' tests show."""

import json
import subprocess

import pytest

from cluster.profiles import read
from datasets_prep.errors import UserError
from jobs import bundle, package
from tests.configs import tiny

SECRET = "never to be written" + " anywhere"  # in two pieces, or this file could not be packed


def written(folder, cluster, monkeypatch, *changes):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    profile = None if "://" in cluster else read(cluster, list(changes))
    made = bundle.write(tiny("s3://data/digits"), cluster, profile, folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (made.files, made.size) == (len(files), sum(map(len, files.values())))
    assert not any(SECRET.encode() in data for data in files.values())
    subprocess.run(["sh", "-n", folder / "run.sh"], check=True)
    return files, files["README.md"].decode(), files["run.sh"].decode()


def test_a_bundle_holds_code_config_lock_and_what_starts_its_cluster(tmp_path, monkeypatch):
    files, readme, script = written(tmp_path / "new", "a100x8x4", monkeypatch)
    assert json.loads(files["run.json"]) == tiny("s3://data/digits").plain()
    assert files["requirements.lock"] == (package.ROOT / "requirements.lock").read_bytes()
    assert package.code_hash(tmp_path / "new/code") == package.code_hash()
    assert any(name.startswith("manifests/kuberay/") for name in files)
    assert "--cluster a100x8x4 " in script and "/code/" not in readme
    for variable in ("RAY_API_SERVER_ADDRESS", "TESSERA_STORAGE", "MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY"):
        assert f"| `{variable}` |" in readme
    with pytest.raises(UserError, match="new is not empty: name a new folder"):
        written(tmp_path / "new", "a100x8x4", monkeypatch)


def test_a_profile_of_one_s_own_travels_along(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "jobs_address: http://ray:8265\nstorage_uri: s3://runs\ntracking_uri: http://mlflow:5000\nnodes: 1\n"
        "node: {cpus: 4, memory_gib: 16, shm_gib: 4, disk_gib: 100}\n"
    )
    files, readme, script = written(tmp_path / "new", str(tmp_path / "mine.yaml"), monkeypatch)
    assert files["cluster.yaml"] == (tmp_path / "mine.yaml").read_bytes()
    assert '--cluster "$here/cluster.yaml" ' in script
    assert "| `RAY_AUTH_TOKEN` |" in readme and "TESSERA_STORAGE` |" not in readme
    assert str(tmp_path) not in readme + script


@pytest.mark.parametrize("secret", [SECRET, "hf" + "_" + "a1B2" * 9])
def test_a_secret_in_a_comment_of_a_profile_stays_here(tmp_path, monkeypatch, secret):
    (tmp_path / "mine.yaml").write_text(
        f"# {secret}\nnodes: 1\nnode: {{cpus: 4, memory_gib: 16, shm_gib: 4, disk_gib: 100}}\n"
    )
    with pytest.raises(UserError, match="in line 1 of cluster.yaml: take it out"):
        written(tmp_path / "new", str(tmp_path / "mine.yaml"), monkeypatch)
    assert not (tmp_path / "new").exists()


def test_an_address_with_a_password_is_not_packed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="^--cluster=https://ray.example:8265 was given with a user and password"):
        written(tmp_path / "new", "https://me:word@ray.example:8265", monkeypatch)


def test_an_address_takes_storage_and_tracking_from_the_environment(tmp_path, monkeypatch):
    files, readme, script = written(tmp_path / "new", "https://ray.example:8265", monkeypatch)
    assert "--cluster https://ray.example:8265 " in script and "| `TESSERA_STORAGE` |" in readme
    assert not any(name.startswith("manifests") for name in files) and "manifests" not in readme
