"""Profiles: a cluster is named or addressed, and what is missing is said with its fix."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from cluster.hardware import GPUS, _nvidia_models, this_node
from cluster.profiles import names, read, resolve
from datasets_prep.errors import UserError

TOKEN = "secret"
NODES = [
    {"state": "ALIVE", "resources_total": {"CPU": 2.0, "memory": 1e9}},
    {"state": "ALIVE", "resources_total": {"CPU": 6.0, "GPU": 1.0, "accelerator_type:A100": 1.0}},
    {"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0}},
]


class _Dashboard(BaseHTTPRequestHandler):
    """Answers the node list of Ray's state API to whoever brings the token."""

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = self.path.startswith("/api/v0/nodes")
        refused = 403 if "Authorization" in self.headers else 401
        self.send_response(200 if allowed and found else 404 if allowed else refused)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"result": {"result": NODES}}}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("TESSERA_STORAGE", "s3://runs")


def test_an_address_takes_tracking_storage_and_token_from_the_environment(dashboard, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    profile = resolve(f"{dashboard}/")
    assert (profile.jobs_address, profile.tracking_uri) == (dashboard, "http://tracking:5000")
    assert profile.storage_uri == "s3://runs"
    assert profile.env["RAY_AUTH_MODE"] == "token"
    assert (profile.cpus, profile.gpus) == (8.0, 1.0)


def test_the_token_may_lie_in_ray_s_own_file(dashboard, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert resolve(dashboard).env["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("token", "message"), [(None, "asks for a token: set RAY_AUTH_TOKEN"), ("x", "refused the token")]
)
def test_a_missing_or_wrong_token_is_named(dashboard, monkeypatch, token, message):
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(UserError, match=message):
        resolve(dashboard)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "TESSERA_STORAGE"])
def test_an_address_without_tracking_or_storage_is_refused(dashboard, monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"needs {name}"):
        resolve(dashboard)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://nowhere.invalid:8265", "http://192.0.2.77:8265"])
def test_no_cluster_at_the_address_is_said_within_seconds(address):
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster at {address}"):
        resolve(address)
    assert time.monotonic() - begin < 6


def test_local_needs_a_stack():
    with pytest.raises(UserError, match="tessera up"):
        resolve("local")


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown profile: use a100x8 or .* or local or .*, a file.yaml, or an address"):
        resolve("a100x9")


MINE = {
    "nodes": 2,
    "node": {"cpus": 2, "memory_gib": 8, "shm_gib": 2, "disk_gib": 20},
    "interconnect": {"between": "ethernet"},
}


def _written(tmp_path, **changes) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINE | changes))
    return str(path)


def test_every_shipped_profile_says_what_its_name_does():
    gpus = {name: (read(name).nodes, read(name).node.gpus, read(name).node.gpu) for name in names() if name != "local"}
    assert gpus == {
        "a100x8": (1, 8, "a100-80gb"),
        "a100x8-40gb": (1, 8, "a100-40gb"),
        "a100x8x4": (4, 8, "a100-80gb"),
        "cpu-cluster": (4, 0, None),
        "rtx4090": (1, 1, "rtx4090"),
        "rtx4090x2": (1, 2, "rtx4090"),
    }


def test_local_is_what_this_machine_has():
    node = read("local").node
    assert node == this_node() and node.cpus == len(os.sched_getaffinity(0)) and node.shm_gib <= node.memory_gib


def test_a_cluster_that_has_what_its_profile_says_is_taken(dashboard, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    node = MINE["node"] | {"cpus": 6, "gpus": 1, "gpu": "a100-40gb"}
    assert resolve(_written(tmp_path, jobs_address=dashboard, nodes=1, node=node)).gpus == 1


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_ray_calls_the_gpus_what_the_table_says(gpu):
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    assert NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(gpu.product) == gpu.ray_type


def test_gpus_are_found_by_what_the_driver_reports(tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:  \t\t 17\n")
    assert _nvidia_models(tmp_path) == [GPUS["h200"].product]


def test_a_file_of_one_s_own_says_where_runs_and_tracking_are(dashboard, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    file = _written(tmp_path, jobs_address=dashboard, storage_uri="s3://mine", tracking_uri="http://mine:5000")
    profile = resolve(file)
    assert (profile.storage_uri, profile.tracking_uri) == ("s3://mine", "http://mine:5000")
    assert profile.file == read(file) and profile.file.storage_uri == profile.env["TESSERA_STORAGE"]


def test_an_address_with_a_password_is_refused_and_not_repeated(monkeypatch, tmp_path):
    address = "https://me:verysecret@ray.example:8265"
    with pytest.raises(UserError, match="^--cluster=https://ray.example:8265 was given with a user and password"):
        resolve(address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    with pytest.raises(UserError, match="^RAY_API_SERVER_ADDRESS=https://ray.example:8265 was given"):
        resolve(_written(tmp_path))


def test_a_profile_without_address_takes_ray_s_own_variable(dashboard, monkeypatch, tmp_path):
    file = _written(tmp_path)
    with pytest.raises(UserError, match="says what the cluster is, and not where: set RAY_API_SERVER_ADDRESS"):
        resolve(file)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard)
    assert resolve(file).jobs_address == dashboard


@pytest.mark.parametrize(
    ("nodes", "node"), [(3, {}), (2, {"cpus": 4}), (1, {"gpus": 2}), (1, {"gpus": 1, "gpu": "h100"})]
)
def test_a_cluster_that_lacks_what_its_profile_says_is_told_what_there_is(
    dashboard, monkeypatch, tmp_path, nodes, node
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    file = _written(tmp_path, jobs_address=dashboard, nodes=nodes, node=MINE["node"] | node)
    with pytest.raises(
        UserError, match=r"1 of 2 CPUs and 0 GPUs, 1 of 6 CPUs and 1 GPUs \(A100\): start what is missing"
    ):
        resolve(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"color": "red"}, "color is no key of a profile; there are: jobs_address, nodes,"),
        ({"nodes": 0}, "nodes=0: .*greater than or equal to 1"),
        ({"interconnect": {}}, "interconnect.between=none: say what connects them"),
        ({"node": MINE["node"] | {"gpus": 1, "gpu": "rtx4080"}}, "gpu=rtx4080 is none of rtx4090, a100-40gb"),
        ({"node": MINE["node"] | {"gpu": "h100"}}, "gpu=h100 with gpus=0"),
        ({"node": MINE["node"] | {"shm_gib": 9}}, "shm_gib=9 must not exceed memory_gib=8"),
        (
            {"env": {"AWS_SECRET_ACCESS_KEY": "x"}},
            "env.AWS_SECRET_ACCESS_KEY is by its name a secret.*; `secrets` names",
        ),
        ({"env": {"WANDB_KEY": "x"}}, "env.WANDB_KEY is by its name a secret"),
        ({"env": {"HF_AUTH": "hf" + "_" + "a1B2" * 9}}, "env.HF_AUTH holds a Hugging Face token"),
        ({"secrets": ["RAY_AUTH_TOKEN=x"]}, "is no name of an environment variable"),
        ({"storage_uri": "s3://me:word@runs"}, "storage_uri=s3://runs was given with a user and password"),
        ({"jobs_address": "https://ray/?token=x"}, "jobs_address=https://ray/ was given with the query token=…"),
        ({"jobs_address": "host:8265"}, "jobs_address=host:8265 must begin with http"),
        ({"runtime": {"kind": "conda"}}, "runtime=?.*installed.*packages.*image"),
    ],
)
def test_a_faulty_profile_is_named_with_its_cure(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        read(_written(tmp_path, **change))


def test_all_faults_of_a_profile_come_at_once(tmp_path):
    with pytest.raises(UserError, match=r"3 fault\(s\)"):
        read(_written(tmp_path, nodes=-1, color="red", precision="fp8"))


def test_a_file_that_is_missing_or_no_yaml_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        read("nowhere/mine.yaml")
    (tmp_path / "mine.yaml").write_text("nodes: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        read(str(tmp_path / "mine.yaml"))
