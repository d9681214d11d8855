"""What a job is told, and what it finds on its nodes."""

import json

import pytest

from cluster.profiles import Profile, read
from datasets_prep.errors import UserError
from jobs import package, submit, tune_submit
from service.data.store import Store


def profile(*changes, **fields):
    told = {"tracking_uri": "http://mlflow:5000", "storage_uri": "s3://runs", "jobs_address": "http://ray:8265"}
    file = read("a100x8x4", list(changes))
    return Profile(name="mine", env={}, cpus=8, gpus=8, file=file, **told | fields)


def test_a_job_gets_addresses_and_the_network_s_settings_and_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x" * 40)
    found = submit.runtime_env(profile("env={NCCL_DEBUG: WARN}"), {"TESSERA_RUN": "demo-1"})
    told = found["env_vars"]
    assert (told["NCCL_DEBUG"], told["MLFLOW_TRACKING_URI"], told["TESSERA_STORAGE"], told["TESSERA_RUN"]) == (
        "WARN", "http://mlflow:5000", "s3://runs", "demo-1",
    )  # fmt: skip
    assert not {"AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"} & set(told) and set(found) == {"env_vars"}


@pytest.mark.parametrize(
    ("field", "name"), [("tracking_uri", "MLFLOW_TRACKING_URI"), ("storage_uri", "TESSERA_STORAGE")]
)
def test_an_address_with_a_password_is_not_sent(field, name):
    with pytest.raises(UserError, match=f"{name}=http://host/x was given with a user and password"):
        submit.runtime_env(profile(**{field: "http://me:verysecret@host/x"}), {})


def test_the_lock_is_installed_where_the_profile_says_so():
    found = submit.runtime_env(profile("runtime={kind: packages}"), {})["uv"]["packages"]
    lines = (package.ROOT / "requirements.lock").read_text().splitlines()
    assert len(found) == len(lines) > 100 and any(line.startswith("ray==") for line in found)
    with pytest.raises(UserError, match="runtime.lock=none.lock of --cluster mine does not exist"):
        submit.runtime_env(profile("runtime={kind: packages, lock: none.lock}"), {})


def test_a_package_is_stored_once(tmp_path):
    (tmp_path / "package.zip").write_bytes(b"first")
    root = Store(tmp_path / "runs")
    uri = submit.keep(root, package.Package(tmp_path / "package.zip", 5, "sha"))
    assert uri == (tmp_path / "runs/packages/sha.zip").as_uri() and root.get("packages/sha.zip") == b"first"
    (tmp_path / "package.zip").write_bytes(b"again")
    assert submit.keep(root, package.Package(tmp_path / "package.zip", 5, "sha")) == uri
    assert root.get("packages/sha.zip") == b"first"


def test_the_newest_checkpoint_that_is_committed_counts(tmp_path):
    run = Store(tmp_path)
    assert submit.newest_step(run) is None
    for folder, marked in [("step-000020-lease-000001", True), ("step-000030-lease-000002", False)]:
        run.put(f"checkpoints/{folder}/rank0", b"x")
        if marked:
            run.put(f"checkpoints/{folder}/COMMIT.json", b"{}")
    assert submit.newest_step(run) == 20


def test_a_sweep_that_ray_has_forgotten_is_retried_as_a_sweep(tmp_path):
    run = Store(tmp_path)
    tags = {"run": "four", "archive": "5ha", "commit": "c0de", "entrypoint": tune_submit.ENTRYPOINT}
    run.put("state.json", json.dumps({"mlflow_run": "1", **tags}).encode())
    facts = submit._facts([], run)
    assert (facts["run"], facts["package"], facts["entrypoint"]) == ("four", "5ha", "python -m jobs.tune sweep.json")
