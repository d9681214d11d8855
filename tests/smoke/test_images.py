"""Every line of the Dockerfiles, carried out in a clean Debian; what comes out works as the image's own user."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from jobs import recipes
from jobs.train import requirements
from service import export, tracking
from service.data.store import Store
from service.models.encoder import build_encoder
from tests.images import Stage, build, debian
from tests.mlflow_server import mlflow_server

ROOT = Path(__file__).parents[2]
LIST = """
import importlib.metadata as metadata
for each in metadata.distributions():
    print(each.name.lower().replace("_", "-").replace(".", "-") + "==" + each.version)
"""
ASK = """
import json, os, signal, subprocess, sys, time, urllib.error, urllib.request

server = subprocess.Popen(sys.argv[1:], start_new_session=True)
try:
    while True:
        try:
            urllib.request.urlopen("http://127.0.0.1:8080/ping")
            break
        except urllib.error.URLError:
            assert server.poll() is None
            time.sleep(0.5)
    body = json.dumps({"inputs": [[[[7, 7, 7]] * 32] * 32] * 2}).encode()
    asked = urllib.request.Request("http://127.0.0.1:8080/invocations", body, {"Content-Type": "application/json"})
    print(*map(len, json.load(urllib.request.urlopen(asked))["predictions"]))
finally:
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and Debian's debootstrap"
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("debian") / "root"
    debian(root)
    return root


def _built(name: str, base: Path, tmp_path: Path) -> Stage:
    stage = build(ROOT / "docker" / f"{name}.Dockerfile", ROOT, base, tmp_path)
    assert stage.run("id", "-u").strip() == stage.user == "1000"
    return stage


def test_nodes_of_a_cluster_have_what_they_run(base, tmp_path):
    stage = _built("train", base, tmp_path)
    assert "Train, evaluate and register" in stage.run(*stage.command)
    assert "rapid" in stage.run("tessera", "recipes")
    stage.run("python", "-c", "import jobs.train, jobs.supervise, service.engine.loop, torchvision, ray.train, mlflow")
    for tool in ("ray", "g++", "rsync", "ssh", "wget", "bash"):
        stage.run("which", tool)
    installed = stage.run("python", "-c", LIST).split()
    locked = {line.split(" ;")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert [line for line in installed if line not in locked] == ["tessera-jepa==0.1.0"]
    assert not {line.split("==")[0] for line in installed} & {"pytest", "ruff", "pyright", "uv"}


def test_mlflow_has_its_database_driver(base, tmp_path):
    stage = _built("tracking", base, tmp_path)
    assert "Usage: mlflow server" in stage.run("mlflow", "server", "--help")
    stage.run("python", "-c", "import psycopg2, boto3")


def test_a_registered_encoder_answers_over_http(base, tmp_path):
    config = recipes.load("demo")
    encoder = build_encoder(image_size=config.data.image_size, **config.family.encoder_options())
    export.write_encoder(Store(tmp_path / "encoder"), encoder, config)
    stage = _built("serve", base, tmp_path)
    with mlflow_server(tmp_path) as server:
        run = tracking.create_run(server.uri, "tests", "demo-1", config, {})
        tracking.register_encoder(server.uri, run, "demo", tmp_path / "encoder", {}, requirements())
        stage.env["MLFLOW_TRACKING_URI"] = server.uri
        answer = stage.run("python", "-c", ASK, *stage.entrypoint, *stage.command)
    assert answer.splitlines()[-1] == f"{encoder.dim} {encoder.dim}"
    installed = {line.split("==")[0] for line in stage.run("python", "-c", LIST).split()}
    assert not installed & {"ray", "pytest", "ruff", "pyright", "uv"}
