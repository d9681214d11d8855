"""Profiles: a cluster is named or addressed, and what is missing is said with its fix."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.profiles import resolve
from datasets_prep.errors import UserError

TOKEN = "secret"
NODES = [
    {"state": "ALIVE", "resources_total": {"CPU": 2.0, "memory": 1e9}},
    {"state": "ALIVE", "resources_total": {"CPU": 6.0, "GPU": 1.0}},
    {"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0}},
]


class _Dashboard(BaseHTTPRequestHandler):
    """Answers the node list of Ray's state API to whoever brings the token."""

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = self.path.startswith("/api/v0/nodes")
        self.send_response(200 if allowed and found else 404 if allowed else 401)
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
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
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


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_missing_or_wrong_token_is_named(dashboard, monkeypatch, token):
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(UserError, match="refused the token: set RAY_AUTH_TOKEN"):
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
    with pytest.raises(UserError, match="unknown profile: use local, or an address"):
        resolve("a100x8")
