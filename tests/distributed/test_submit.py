"""Submitted jobs on a real local stack: the command line from the outside, two train workers, MLflow, resume."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster import address, local
from cluster.credentials import own_secrets
from jobs import package
from service.data.store import Store
from service.engine.checkpoint import committed
from tests.configs import TINY
from tests.distributed.chaos.harness import losses_of
from tests.servers import tls_proxy

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
SMALL = [*TINY, "parallel.workers=2", "eval.labels_per_class=[1]", "eval.label_draws=3", "schedule.start_lr=0"]


@pytest.fixture(scope="module")
def trained(tessera, digits):
    """Result of a first submitted run, as the command printed it."""
    out = tessera("submit", "demo", *SMALL, f"data.uri={digits}", "schedule.steps=12", "seed=1", "--json")
    return json.loads(out.splitlines()[-1])


def runs(stack, run):
    return Store(stack.storage_uri).sub(run)


def test_a_submitted_run_ends_in_a_registered_encoder(stack, tessera, trained, digits, tmp_path):
    import mlflow

    assert trained["steps"] == 12 and trained["model_uri"] == "models:/demo/1" and trained["champion"]
    assert set(trained["scores"]["trained"]) == {"1", "all", "knn"}
    client = mlflow.MlflowClient(stack.mlflow_uri, stack.mlflow_uri)
    run = client.get_run(trained["mlflow_run"])
    assert run.info.status == "FINISHED"
    assert run.data.params["family.encoder.width"] == "8" and run.data.params["optim.kind"] == "adamw"
    assert run.data.tags["fingerprint"] and run.data.tags["package"] and run.data.tags["commit"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, 13))
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "pictures")]
    assert pictures == ["pictures/curves.png", "pictures/goodput.png"]
    report = json.loads(tessera("report", trained["run"], "--json"))
    assert (report["outcome"], report["steps"], report["lost_steps"]) == ("finished", 12, 0)
    assert client.get_metric_history(run.info.run_id, "goodput")[-1].value == trained["goodput"]["goodput"]
    assert client.get_metric_history(run.info.run_id, "monitor/encoder/rankme")[-1].step == 12
    version = client.get_model_version_by_alias("demo", "champion")
    assert version.tags["run"] == trained["run"] and float(version.tags["val_linear"]) == trained["val_linear"]
    mlflow.set_tracking_uri(stack.mlflow_uri)
    model = mlflow.pyfunc.load_model("models:/demo@champion")
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    features = model.predict(images)
    assert features.shape == (3, 64) and features.dtype == np.float32

    import torch

    from service import export, tracking

    folder = tracking.download_encoder(stack.mlflow_uri, "models:/demo@champion", tmp_path)
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    program = torch.export.load(folder / export.PROGRAM).module()
    np.testing.assert_allclose(program(torch.from_numpy(images)).detach().numpy(), features, atol=1e-5)
    np.testing.assert_allclose(export.PyfuncEncoder(folder).predict(images), features, atol=1e-6)


def test_the_same_command_again_shows_the_finished_run(stack, tessera, trained, digits):
    command = ["submit", "demo", *SMALL, f"data.uri={digits}", "schedule.steps=12", "seed=1"]
    assert json.loads(tessera(*command, "--json"))["run"] == trained["run"]
    assert "finished" in tessera(*command)
    planned = json.loads(tessera(*command, "--dry-run", "--new", "--json"))
    assert planned["run"] != trained["run"] and planned["state"] == "planned" and planned["steps"] == 12
    [job] = json.loads(tessera("jobs", "list", "--json"))["jobs"]
    assert (job["run"], job["recipe"], job["state"]) == (trained["run"], "demo", "SUCCEEDED")
    assert (job["step"], job["steps"], job["goodput"]) == (12, 12, trained["goodput"]["goodput"])
    assert job["commit"] == package.commit() and "12 of 12" in tessera("jobs", "list")
    assert "finished 12 steps" in tessera("jobs", "logs", trained["run"], "--no-follow")
    assert "ended already (SUCCEEDED): nothing to stop" in tessera("jobs", "stop", trained["run"], code=2)
    assert "ended already" in tessera("jobs", "attach", trained["run"], code=2)
    assert "finished" in tessera("jobs", "retry", trained["run"])


def test_what_ran_is_kept_and_holds_no_key(stack, tessera, trained):
    """The package, the job as Ray tells it, all of Ray's and the servers' logs, and all that MLflow keeps."""
    told = json.dumps(asked(stack, "/api/jobs/"))
    [stored] = [name for name in Store(stack.storage_uri).list("packages") if name.split("/")[1][:64] in told]
    archive = Store(stack.storage_uri).get(stored)
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        contents = {name: packed.read(name) for name in packed.namelist()}
    assert json.loads(contents["run.json"])["schedule"]["steps"] == 12 and "requirements.lock" in contents
    state = json.loads(runs(stack, trained["run"]).get("state.json"))
    assert f"packages/{state['archive']}.zip" == stored
    assert contents.get("changes.patch") == package.patch()
    folders = [stack.scratch / "session_latest" / "logs", stack.data / "logs", stack.data / "mlflow"]
    found = (path for folder in folders for path in folder.rglob("*") if path.name != "s3.log")  # it knows its keys
    files = {path: path.read_bytes() for path in found if path.is_file()}
    assert any("job-driver" in path.name for path in files) and any(path.suffix == ".db" for path in files)
    kept = Store(stack.storage_uri)
    objects = {name: kept.get(name) for name in kept.list() if not name.startswith("packages/")}
    for variable, secret in own_secrets(stack.env).items():
        places = {"job": told.encode(), **contents, **files, **objects}
        assert [str(place) for place, data in places.items() if secret in data] == [], variable
    assert len(own_secrets(stack.env)) == 3


def test_evaluate_scores_a_registered_encoder_as_the_run_did(stack, tessera, trained, digits):
    result = json.loads(tessera("evaluate", "models:/demo@champion", "--data", digits, "--json"))
    assert result["scores"] == trained["scores"] and result["fingerprint"] == result["trained_on"]
    assert "trained encoder" in tessera("evaluate", "models:/demo/1", "--labels", 2)
    assert "has no such model" in tessera("evaluate", "models:/nobody@champion", code=2)


def test_register_repeats_with_the_same_version(stack, tessera, trained):
    again = json.loads(tessera("register", trained["run"], "--json"))
    assert again["model_uri"] == trained["model_uri"] and not again["champion"]
    assert "no run 'nothing'" in tessera("register", "nothing", code=2)
    assert "sent 0 values" in tessera("sync", trained["run"])


def driver(run, stack):
    """The driver process of a run's job."""
    marker = f"TESSERA_JOB={run}"
    for process in psutil.process_iter(["cmdline", "environ"]):
        environment = process.info["environ"] or {}
        if "jobs.train" in (process.info["cmdline"] or []) and environment.get("TESSERA_JOB", "").startswith(run):
            return process
    raise AssertionError(marker)


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_whose_driver_was_killed_goes_on(stack, tessera, digits):
    """What that changes of the losses, the chaos suite tells; how a job is stopped, the test on two hosts."""
    settings = [*SMALL, "schedule.steps=240", "checkpoint.every=10 steps", "compute.deterministic=true"]
    command = ["submit", "demo", *settings, f"data.uri={digits}", "seed=2"]
    started = json.loads(tessera(*command, "--no-follow", "--json"))
    store = runs(stack, started["run"])
    attached = json.loads(tessera(*command, "--no-follow", "--json"))
    assert (attached["state"], attached["job"]) == ("attached", started["job"])
    wait_until(lambda: newest_step(store) >= 20)
    other = [*command, "optim.lr=0.02", "--resume", started["run"], "--allow-change", "optim.lr"]
    assert f"{started['job']} of {started['run']} is alive with other settings" in tessera(*other, code=2)
    os.kill(driver(started["run"], stack).pid, signal.SIGKILL)
    wait_for_end(stack, started["job"])
    assert not store.exists("result.json") and mlflow_status(stack, store) == "RUNNING"
    assert {job["run"] for job in json.loads(tessera("jobs", "list", "--json"))["jobs"]} >= {started["run"]}
    assert mlflow_status(stack, store) == "KILLED"
    retried = json.loads(tessera("jobs", "retry", started["run"], "--no-follow", "--json"))
    assert (retried["run"], retried["state"], retried["package"]) == (started["run"], "resumed", started["package"])
    resumed = json.loads(tessera("jobs", "attach", started["run"], "--json").splitlines()[-1])
    assert resumed["run"] == started["run"]
    assert resumed["resumed_from"] >= 20 and resumed["steps"] == 240
    taken = losses_of(store)
    assert set(taken) == set(range(1, 241))
    assert all(len(values) == 1 for values in taken.values())  # of steps taken twice too
    assert len(leases(store)) == 2


def wait_for_end(stack, job):
    wait_until(lambda: asked(stack, f"/api/jobs/{job}")["status"] in ("SUCCEEDED", "FAILED", "STOPPED"))


def asked(stack, path):
    """Ray's word, by its HTTP interface: its client takes token authentication from the first import on."""
    return address.ask(stack.ray_address, path, stack.env)


def mlflow_status(stack, store):
    import mlflow

    client = mlflow.MlflowClient(stack.mlflow_uri, stack.mlflow_uri)
    return client.get_run(json.loads(store.get("state.json"))["mlflow_run"]).info.status


def test_a_second_driver_waits_then_takes_over(stack, tessera, digits):
    settings = [*SMALL, "schedule.steps=120", "checkpoint.every=10 steps", f"data.uri={digits}", "seed=3"]
    started = json.loads(tessera("submit", "demo", *settings, "--no-follow", "--json"))
    store = runs(stack, started["run"])
    wait_until(lambda: store.exists("lease/000001.json"))
    environment = os.environ | local.client_environment(stack) | {"RAY_ADDRESS": stack.gcs_address}
    second = subprocess.Popen(
        [sys.executable, "-u", "-m", "jobs.train", "demo", *settings],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    try:
        assert second.stdout is not None
        assert second.stdout.readline().strip() == f"run {started['run']}"
        assert second.stdout.readline().startswith(f"attached: the run is held by job {started['job']}")
        wait_until(lambda: newest_step(store) >= 20)
        assert leases(store) == ["lease/000001.json"]
        os.kill(driver(started["run"], stack).pid, signal.SIGKILL)
        out, _ = second.communicate(timeout=200)
    finally:
        second.kill()
    assert second.returncode == 0 and "finished 120 steps" in out
    assert leases(store) == ["lease/000001.json", "lease/000002.json"]
    result = json.loads(store.get("result.json"))
    assert result["resumed_from"] >= 20 and result["model_uri"].startswith("models:/demo/")
    assert all(len(values) == 1 for values in losses_of(store).values()) and set(losses_of(store)) == set(range(1, 121))


ABANDON = """
import os, ray
ray.init(logging_level="ERROR")

@ray.remote(num_cpus=0)
class Holder:
    def hold(self):
        group = ray.util.placement_group([{"CPU": 1}])
        ray.get(group.ready())
        return group.id.hex()

holder = Holder.options(lifetime="detached", name="holder", namespace="test").remote()
print(ray.get(holder.hold.remote()), flush=True)
"""
FREE = """
import ray
from jobs.supervise import free_placement_groups
ray.init(logging_level="ERROR")
print(*free_placement_groups(), flush=True)
print(*free_placement_groups(), flush=True)
ray.kill(ray.get_actor("holder", namespace="test"))
"""


def test_placement_groups_of_jobs_that_ended_are_freed(stack):
    environment = os.environ | local.client_environment(stack) | {"RAY_ADDRESS": stack.gcs_address}

    def printed(code):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    [left] = printed(ABANDON)
    assert printed(FREE) == [left, ""]


def newest_step(store):
    """Step of the newest committed checkpoint."""
    return max((int(folder.split("-")[1]) for folder in committed(store.sub("checkpoints"))), default=0)


def leases(store):
    return [name for name in store.list("lease") if name.endswith(".json")]


def test_plain_ray_job_submit_works_and_joins_the_same_run(stack, tessera, digits, trained):
    settings = [*SMALL, f"data.uri={digits}", "schedule.steps=12", "seed=1"]
    environment = os.environ | local.client_environment(stack)
    arguments = ["job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.train", "demo", *settings]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run {trained['run']}" in done.stdout and "encoder models:/demo/1" in done.stdout


def test_a_failed_job_gives_its_exit_code_and_the_cure(stack, tessera, digits):
    import mlflow

    settings = [
        "optim.kind=sgd",
        "optim.lr=1e18",
        "schedule.warmup_epochs=0",
        "schedule.steps=8",
    ]
    command = ["submit", "demo", *SMALL, *settings, f"data.uri={digits}"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert "lower optim.lr" in done.stdout and "last good checkpoint is of step 0" in done.stdout
    client = mlflow.MlflowClient(stack.mlflow_uri, stack.mlflow_uri)
    experiment = client.get_experiment_by_name("tessera").experiment_id
    newest = client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=1)[0]
    assert newest.data.params["optim.lr"] == "1e+18" and newest.info.status == "FAILED"


@pytest.fixture
def elsewhere(stack, tmp_path):
    """Environment of a client that knows the stack as a cluster behind TLS, and not as the machine's own."""
    client = {name: value for name, value in os.environ.items() if name not in address.CA_VARIABLES}
    client |= {"XDG_STATE_HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": stack.env["RAY_AUTH_TOKEN_PATH"]}
    return client | {"MLFLOW_TRACKING_URI": stack.mlflow_uri, "TESSERA_STORAGE": stack.storage_uri}


def test_a_cluster_behind_tls_is_used_with_its_authority(stack, tessera, trained, elsewhere, tmp_path, digits):
    with tls_proxy(stack.ports["dashboard"], tmp_path) as proxy:
        trusting = elsewhere | {"REQUESTS_CA_BUNDLE": str(proxy.authority)}
        there = ["--cluster", proxy.address]
        listed = json.loads(tessera("jobs", "list", "--json", *there, env=trusting))["jobs"]
        assert trained["run"] in [job["run"] for job in listed]
        assert "finished 12 steps" in tessera("jobs", "logs", trained["run"], *there, env=trusting)
        assert "is not trusted" in tessera("jobs", "list", *there, env=elsewhere, code=2)
        (tmp_path / "wrong").write_text("0" * 64)
        wrong = trusting | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}
        assert "refused the token" in tessera("jobs", "list", *there, env=wrong, code=2)


def test_another_ray_there_than_here_is_refused(stack, tessera, elsewhere, tmp_path, digits):
    here = version("ray").encode()
    with tls_proxy(stack.ports["dashboard"], tmp_path, lambda data: data.replace(here, b"1" + here[1:])) as proxy:
        other = elsewhere | {"SSL_CERT_FILE": str(proxy.authority)}
        command = ["submit", "demo", f"data.uri={digits}", "--cluster", proxy.address]
        error = tessera(*command, env=other, code=2)
    assert f"runs Ray 1{here[1:].decode()}, and this is Ray {here.decode()}" in error


def test_a_cluster_that_goes_away_in_mid_submit_leaves_nothing_behind(stack, tessera, elsewhere, tmp_path, digits):
    settings = [*SMALL, f"data.uri={digits}", "schedule.steps=2", "seed=11"]
    before = {job["job"] for job in json.loads(tessera("jobs", "list", "--json"))["jobs"]}
    with tls_proxy(stack.ports["dashboard"], tmp_path, cut=b"POST /api/jobs/") as proxy:
        trusting = elsewhere | {"REQUESTS_CA_BUNDLE": str(proxy.authority)}
        error = tessera("submit", "demo", *settings, "--cluster", proxy.address, env=trusting, code=2)
    assert "is away" in error and "the same command goes on when it is back" in error
    assert {job["job"] for job in json.loads(tessera("jobs", "list", "--json"))["jobs"]} == before
    planned = json.loads(tessera("submit", "demo", *settings, "--dry-run", "--json"))
    assert runs(stack, planned["run"]).list() == []
    done = json.loads(tessera("submit", "demo", *settings, "--no-follow", "--json"))
    assert (done["state"], done["job"]) == ("submitted", f"{planned['run']}-01")


FROM_STORAGE = """
import sys
from pathlib import Path
from cluster import profiles
from jobs import package, submit
submit.RAY_LIMIT = 0
profile = profiles.resolve("local")
built = package.write(package.collect(), {"note.txt": b"from storage"}, Path(sys.argv[1]) / "package.zip")
with submit.job_client(profile) as client:
    told = 'print(open("note.txt").read(), package.code_hash(), package.commit())'  # whole lines: Ray logs there too
    entrypoint = f"python -c 'from jobs import package; {told}'"
    submit.launch(client, profile, built, "from-storage", entrypoint, {}, {"note": "none"})
    code = submit.follow(client, "from-storage", print)
    print(client.get_job_info("from-storage").runtime_env["working_dir"])
sys.exit(code)
"""


def test_a_package_above_ray_s_limit_goes_through_the_storage_of_runs(stack, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FROM_STORAGE, tmp_path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from storage {package.code_hash()} {package.commit()}\n" in done.stdout
    assert "\ns3://runs/packages/" in done.stdout


@pytest.mark.slow  # a minute and more
def test_a_bundle_runs_by_its_own_readme_where_nothing_else_is(stack, tessera, digits, tmp_path):
    made = [*TINY, f"data.uri={digits}", "schedule.steps=2", "seed=12"]
    wrote = json.loads(tessera("package", "demo", *made, "-o", tmp_path / "bundle", "--json"))
    assert wrote["files"] == sum(path.is_file() for path in (tmp_path / "bundle").rglob("*"))
    assert "is not empty" in tessera("package", "demo", *made, "-o", tmp_path / "bundle", code=2)
    moved = tmp_path / "empty" / "bundle"
    moved.parent.mkdir()
    (tmp_path / "bundle").rename(moved)
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHON": sys.executable}
    clean |= {name: os.environ[name] for name in ("XDG_STATE_HOME", "TESSERA_CACHE")}
    commands = re.findall(r"```\n(.*?)```", (moved / "README.md").read_text(), re.DOTALL)
    assert [block.split("\n") for block in commands] == [
        ["./run.sh --dry-run", "./run.sh", ""],
        ["./run.sh --plain", ""],
    ]

    def run_line(line):
        done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=moved, env=clean, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    planned, submitted, plain = map(run_line, "".join(commands).splitlines())
    run = re.search(r"^run +(demo-\w+)  planned", planned, re.MULTILINE)[1]
    assert f"{run}  submitted as job {run}-01" in submitted and "encoder models:/demo/" in submitted
    assert f"run {run}\n" in plain and "finished 2 steps" in plain
    here, there = losses_of(Store(moved / "runs").sub(run)), losses_of(runs(stack, run))
    assert [here.keys(), there.keys()] == [{1, 2}, {1, 2}]
    assert [*here[1], *here[2]] == pytest.approx([*there[1], *there[2]], rel=1e-3)


def test_bad_input_ends_before_anything_starts(stack, tessera, digits, tmp_path):
    before = len(json.loads(tessera("jobs", "list", "--json"))["jobs"])
    at = f"data.uri={digits}"
    cases = [
        (["submit", "dmo"], "did you mean 'demo'"),
        (["submit", "demo", at, "optim.lrr=1"], "did you mean 'lr'"),
        (["submit", "demo", f"data.uri={tmp_path}"], "holds no index.json"),
        (["submit", "demo", "data.uri=s3://nothing/here"], "s3://nothing/here"),
        (["submit", "demo", at, "data.train_split=trian"], "no split 'trian', it has: train, val, test"),
        (["submit", "demo", at, "data.batch_size=2048"], "lower data.batch_size"),
        (["submit", "demo", at, "parallel.workers=64"], "needs 64 CPUs, the cluster has"),
        (["submit", "demo", at, "compute.device=cuda"], "need 2 GPUs, the cluster has 0"),
        (["submit", "demo", at, "--cluster", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["submit", "demo", at, "--cluster", "a100x80"], "unknown profile"),
        (["evaluate", "models:/demo/1", "--tracking-uri", "http://127.0.0.1:9"], "MLflow at http://127.0.0.1:9 failed"),
        (["shard", "digitz", "--out", tmp_path / "x"], "source 'digitz' is unknown"),
        (["evaluate", "demo"], "models:/NAME"),
        (["config", "show", "demo", "seed=x"], "seed='x'"),
    ]
    with ThreadPoolExecutor(2) as pool:
        errors = pool.map(lambda case: tessera(*case[0], code=2), cases)
    for (arguments, message), error in zip(cases, errors, strict=True):
        assert error.startswith("error: ") and message in error, (arguments, error)
    assert len(json.loads(tessera("jobs", "list", "--json"))["jobs"]) == before
