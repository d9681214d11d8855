"""Ray's HTTP interface: TLS for real, with a certificate of the test's own, and every way it can fail, named."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import address, profiles
from datasets_prep.errors import UserError
from jobs.submit import check_versions
from tests.servers import free_ports, tls_proxy


class Dashboard(BaseHTTPRequestHandler):
    """Answers as Ray's dashboard does, of a cluster with Ray 2.60 and Python 3.11."""

    def do_GET(self):
        answers = {
            "/api/v0/nodes?detail=true": {"result": {"result": [{"state": "ALIVE", "resources_total": {"CPU": 3.0}}]}},
            "/api/v0/cluster_metadata": {"rayVersion": "2.60.0", "pythonVersion": "3.11.9"},
        }
        self.send_response(200 if self.path in answers else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"data": answers.get(self.path)}).encode())

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def tls(port, tmp_path_factory):
    with tls_proxy(port, tmp_path_factory.mktemp("tls")) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    for name in (*address.CA_VARIABLES, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("TESSERA_STORAGE", "s3://runs")


@pytest.mark.parametrize("variable", address.CA_VARIABLES)
def test_an_authority_of_one_s_own_is_trusted_by_all_libraries(tls, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tls.authority))
    profile = profiles.resolve(tls.address)
    assert profile.cpus == 3
    assert {profile.env[name] for name in address.CA_VARIABLES} == {str(tls.authority)}


def failure(uri, env=None):
    with pytest.raises(UserError) as raised:
        address.nodes(uri, os.environ | (env or {}))
    return str(raised.value)


def test_what_is_wrong_with_tls_is_named_with_the_cure(tls, port, tmp_path):
    trusted = {"REQUESTS_CA_BUNDLE": str(tls.authority)}
    assert "is not trusted (self-signed certificate): set REQUESTS_CA_BUNDLE" in failure(tls.address)
    other_name = tls.address.replace("localhost", "127.0.0.1")
    assert "IP address mismatch" in failure(other_name, trusted) and "host name" in failure(other_name, trusted)
    assert "does not speak TLS" in failure(f"https://localhost:{port}", trusted)
    assert "or write https:// if it speaks TLS" in failure(tls.address.replace("https", "http"))
    assert "/none.pem does not exist" in failure(tls.address, {"SSL_CERT_FILE": "/none.pem"})
    (tmp_path / "empty.pem").write_text("")
    assert "holds no certificates" in failure(tls.address, {"SSL_CERT_FILE": str(tmp_path / "empty.pem")})
    [closed] = free_ports(1)
    assert f"no Ray cluster at https://localhost:{closed}" in failure(f"https://localhost:{closed}", trusted)


def test_a_file_that_holds_no_token_is_named_and_not_repeated(port, tmp_path):
    (tmp_path / "key.pem").write_text("-----BEGIN\nprivate-lines\n")
    message = failure(f"http://127.0.0.1:{port}", {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "key.pem")})
    assert "key.pem holds no token" in message and "private-lines" not in message


def test_a_server_that_is_not_ray_is_named(port):
    with pytest.raises(UserError, match="answered 404: is this the address of Ray's dashboard"):
        address.ask(f"http://127.0.0.1:{port}", "/other", {})


@pytest.mark.parametrize(
    ("ray", "python", "message"),
    [
        ("2.60.3", "3.11.2", None),
        (
            "2.59.0",
            "3.11.2",
            r"runs Ray 2\.60\.0, and this is Ray 2\.59\.0: start the cluster with Ray 2\.59\.0, submit",
        ),
        ("2.60.0", "3.12.1", r"runs Python 3\.11\.9, and this is Python 3\.12\.1"),
    ],
)
def test_versions_that_differ_are_refused_with_both_and_the_fix(port, monkeypatch, ray, python, message):
    monkeypatch.setattr("jobs.submit.version", {"ray": ray}.get)
    monkeypatch.setattr("jobs.submit.platform.python_version", lambda: python)
    profile = profiles.resolve(f"http://127.0.0.1:{port}")
    if message is None:
        check_versions(profile)
        return
    with pytest.raises(UserError, match=message):
        check_versions(profile)
    with_image = profiles.read("a100x8")
    assert with_image.runtime.kind == "image"
    check_versions(profile.model_copy(update={"file": with_image}))
