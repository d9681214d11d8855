"""Runs, metrics and encoders against a real MLflow server, one that is killed and comes back included."""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datasets_prep.errors import UserError
from service import tracking
from service.config import RunConfig
from service.data.store import Store
from service.tracking import Tracker
from tests.mlflow_server import MlflowServer, mlflow_server

pytestmark = pytest.mark.distributed

CONFIG = RunConfig.model_validate(
    {
        "name": "demo",
        "data": {"uri": "data/digits"},
        "family": {"kind": "image_vicreg", "loss": {"kind": "vicreg", "cov_norm": "paper"}},
    }
)
SCORES = {"fingerprint": "f1", "protocol": "p1", "val_linear": 90.0, "val_linear_se": 0.5}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)


@pytest.fixture
def run_id(server) -> str:
    return tracking.create_run(server.uri, "tests", "demo-1", CONFIG, {})


def history(client, run_id: str, metric: str) -> list[tuple[int, float]]:
    """All points of a metric in the order of their arrival."""
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def test_a_run_carries_its_whole_config(server, client):
    tracking.check(server.uri)
    run_id = tracking.create_run(server.uri, "tests", "demo-abc", CONFIG, {"fingerprint": "f1", "commit": "c1"})
    run = client.get_run(run_id)
    assert run.info.run_name == "demo-abc"
    assert run.data.params == dict(tracking.leaves(CONFIG.plain()))
    assert run.data.params["optim.lr"] == "0.3"
    assert {"fingerprint": "f1", "commit": "c1"}.items() <= run.data.tags.items()
    stored = Path(client.download_artifacts(run_id, "config.json"))
    assert RunConfig.model_validate(json.loads(stored.read_text())) == CONFIG
    tracking.finish(server.uri, run_id, "FAILED")
    assert client.get_run(run_id).info.status == "FAILED"
    tracking.reopen(server.uri, run_id)
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_deleted_experiment_is_named_with_the_cure(server, client):
    tracking.create_run(server.uri, "gone", "demo-1", CONFIG, {})
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(UserError, match="tracking.experiment=gone was deleted.*restore"):
        tracking.create_run(server.uri, "gone", "demo-2", CONFIG, {})


def test_a_database_that_cannot_be_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/mlflow.db failed"):
        tracking.check(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


def test_runs_need_no_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"
    tracking.check(uri)
    tracking.create_run(uri, "tests", "demo-1", CONFIG, {})
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert len(list((tmp_path / "home").rglob("config.json"))) == 1


def test_a_resumed_run_sends_no_step_twice(server, client, run_id, tmp_path):
    store = Store(tmp_path)
    first = Tracker(store, server.uri, run_id)
    for step in (10, 20, 30):
        first.log(step, {"loss": step / 10, "lr": 0.5})
    assert first.close(30)
    resumed = Tracker(store, server.uri, run_id)  # from a checkpoint at step 10
    for step in (20, 30, 40):
        resumed.log(step, {"loss": step / 10, "lr": 0.5})
    resumed.log(30, {"val/linear": 61.0})  # a metric of its own, at a step that others have had
    assert resumed.close(30)
    assert history(client, run_id, "loss") == [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)]
    assert history(client, run_id, "val/linear") == [(30, 61.0)]


def test_a_picture_lies_among_the_artifacts(server, client, run_id):
    tracking.log_picture(server.uri, run_id, "curves.png", b"\x89PNG")
    assert Path(client.download_artifacts(run_id, "pictures/curves.png")).read_bytes() == b"\x89PNG"


def test_sync_sends_what_an_absent_server_missed(server, client, run_id, tmp_path):
    store = Store(tmp_path)
    for steps in ((1, 2), (2, 3)):  # two sessions; the second repeats a step
        tracker = Tracker(store, None, run_id)
        for step in steps:
            tracker.log(step, {"loss": float(step)})
        tracker.close(10)
    assert tracking.sync(store, server.uri, run_id) == 3
    assert tracking.sync(store, server.uri, run_id) == 0
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_all_rows_arrive_once_and_in_order_when_the_server_is_killed(server, client, run_id, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_CHUNK_ROWS", 100)
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.5)
    tracker = Tracker(Store(tmp_path), server.uri, run_id, flush_seconds=0.05)
    slowest, step = 0.0, 0

    def train(steps: int) -> None:
        nonlocal slowest, step
        for _ in range(steps):
            step += 1
            begin = time.perf_counter()
            tracker.log(step, {"loss": 1.0 / step, "lr": float(step)})
            slowest = max(slowest, time.perf_counter() - begin)
            time.sleep(0.005)

    train(200)
    server.kill()
    train(200)
    assert tracker.flush(10), "rows go to the storage while MLflow is away"
    server.start()
    train(200)
    assert tracker.close(60)
    assert history(client, run_id, "lr") == [(step, float(step)) for step in range(1, 601)]
    assert history(client, run_id, "loss") == [(step, 1.0 / step) for step in range(1, 601)]
    assert slowest < 0.1


def test_rows_of_a_killed_writer_go_out_before_those_of_the_next(server, client, run_id, tmp_path):
    store = Store(tmp_path)
    killed = Tracker(store, None, run_id)  # its MLflow was away, and then the process went
    killed.log(1, {"loss": 1.0})
    killed.close(10)
    tracker = Tracker(store, server.uri, run_id)
    tracker.log(2, {"loss": 2.0})
    assert tracker.close(30)
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 2.0)]


@pytest.fixture
def encoder_dir(tmp_path) -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    ends = {"input": ("uint8", [-1, -1, -1, 3]), "output": ("float32", [-1, 64])}
    described = {end: {"dtype": dtype, "shape": shape} for end, (dtype, shape) in ends.items()}
    (folder / "preprocessing.json").write_text(json.dumps(described))
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "config.json").write_text("{}")
    return folder


def register(server, encoder_dir: Path, model: str, **changes: object) -> str:
    run_id = tracking.create_run(server.uri, "tests", "demo-1", CONFIG, {})
    return tracking.register_encoder(server.uri, run_id, model, encoder_dir, {**SCORES, **changes}, ["numpy"])


def test_a_registered_encoder_comes_back_as_it_was(server, client, run_id, encoder_dir, tmp_path):
    version = tracking.register_encoder(server.uri, run_id, "demo", encoder_dir, SCORES, ["numpy"])
    assert tracking.register_encoder(server.uri, run_id, "demo", encoder_dir, SCORES, ["numpy"]) == version
    assert len(client.search_model_versions("name='demo'")) == 1
    info = tracking.model_info(server.uri, f"models:/demo/{version}")
    assert (info.run_id, info.uri) == (run_id, f"models:/demo/{version}")
    assert info.tags == {"fingerprint": "f1", "protocol": "p1", "val_linear": "90.0", "val_linear_se": "0.5"}
    folder = tracking.download_encoder(server.uri, f"models:/demo/{version}", tmp_path / "download")
    for file in encoder_dir.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "download").rglob("*.pkl"))


def test_mlflow_itself_can_load_the_encoder(server, encoder_dir, monkeypatch):
    import mlflow

    class Loaded:
        def predict(self, images, params=None):
            return np.zeros((len(images), 64), np.float32)

    module = types.ModuleType(tracking.LOADER)
    monkeypatch.setattr(module, "_load_pyfunc", lambda path: Loaded(), raising=False)
    monkeypatch.setitem(sys.modules, tracking.LOADER, module)
    version = register(server, encoder_dir, "loadable")
    mlflow.set_tracking_uri(server.uri)
    model = mlflow.pyfunc.load_model(f"models:/loadable/{version}")
    assert model.predict(np.zeros((3, 16, 16, 3), np.uint8)).shape == (3, 64)
    with pytest.raises(mlflow.MlflowException, match="schema"):
        model.predict(np.zeros((3, 16, 16, 3), np.float32))


def test_the_champion_moves_only_when_beaten_beyond_doubt(server, encoder_dir):
    def contend(**changes: object) -> tuple[bool, str]:
        return tracking.move_champion(server.uri, "ring", register(server, encoder_dir, "ring", **changes))

    assert contend() == (True, "version 1 is the first champion (90.00 %)")
    assert contend(val_linear=90.4)[0] is False
    assert contend(val_linear=99.0, fingerprint="f2") == (
        False,
        "version 3 cannot be compared with champion 1: fingerprint f2 against f1",
    )
    assert "protocol p2 against p1" in contend(val_linear=99.0, protocol="p2")[1]
    assert tracking.model_info(server.uri, "models:/ring@champion").version == "1"
    moved, reason = contend(val_linear=90.6)
    assert moved and "+0.60 points against champion 1" in reason
    assert tracking.model_info(server.uri, "models:/ring@champion").version == "5"
    assert tracking.move_champion(server.uri, "ring", "5") == (False, "version 5 is the champion already")
    with pytest.raises(UserError, match="val_linear=good, and comparing needs a number"):
        contend(val_linear="good")


def test_an_unknown_encoder_is_refused_with_what_there_is(server, encoder_dir):
    register(server, encoder_dir, "known")
    with pytest.raises(UserError, match=r"no such model \(it has: .*known"):
        tracking.model_info(server.uri, "models:/unknown@champion")
    with pytest.raises(UserError, match="known has no @champion: it has /1"):
        tracking.model_info(server.uri, "models:/known@champion")
    with pytest.raises(UserError, match="known has no /7: it has /1"):
        tracking.model_info(server.uri, "models:/known/7")


def test_runs_that_nobody_carries_on_are_ended_and_no_others(server, client, tmp_path):
    from jobs.train import STATE, outcome
    from service.engine.lease import Lease

    def begun(name, at=tmp_path):
        store = Store(at / name)
        run_id = tracking.create_run(server.uri, "tests", name, CONFIG, {"run": name, "storage": store.uri})
        store.put(STATE, json.dumps({"mlflow_run": run_id}).encode())
        return store, run_id

    (alive, living), (_, dead), (finished, trained) = begun("alive"), begun("dead"), begun("finished")
    (_, foreign), (_, superseded) = begun("foreign", tmp_path.parent / "elsewhere"), begun("dead")
    finished.put("result.json", json.dumps({"model_uri": "models:/demo/1"}).encode())
    with Lease(alive):
        ended = tracking.reconcile(server.uri, tmp_path.as_uri(), outcome)
        assert sorted(ended) == ["dead", "dead", "finished"]
        status = {run: client.get_run(run).info.status for run in (living, dead, superseded, trained, foreign)}
        assert list(status.values()) == ["RUNNING", "KILLED", "KILLED", "FINISHED", "RUNNING"]
        assert tracking.reconcile(server.uri, tmp_path.as_uri(), outcome) == []
    assert tracking.reconcile(server.uri, tmp_path.as_uri(), outcome) == ["alive"]


def test_a_refusal_is_told_from_a_server_that_is_away(server):
    with pytest.raises(UserError) as refused:
        tracking.reopen(server.uri, "0" * 32)
    assert not isinstance(refused.value, tracking.TrackingAway)
