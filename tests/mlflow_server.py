"""A real MLflow server for tests, which can be killed and started again on the same port and database."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.servers import free_ports


class MlflowServer:
    """One server with its database, artifacts and log below `root`."""

    def __init__(self, root: Path, host: str = "127.0.0.1"):
        self.root, self.host = root, host
        self.port = free_ports(1)[0]
        self.uri = f"http://{host}:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers=1", f"--host={self.host}"),
            *(f"--port={self.port}", f"--allowed-hosts={self.host}:*"),
            *(f"--backend-store-uri=sqlite:///{self.root / 'mlflow.db'}", "--serve-artifacts"),
            f"--artifacts-destination={self.root / 'artifacts'}",
        ]
        env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.root / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.root)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.root / "mlflow.log").read_text()[-2000:]
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.1)
        raise TimeoutError(f"MLflow did not answer at {self.uri}")

    def kill(self) -> None:
        """End the server and its workers at once."""
        if self.process is None:
            return
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.process = None


@contextmanager
def mlflow_server(root: Path) -> Iterator[MlflowServer]:
    """Run a server below `root` for the length of the block."""
    root.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(root)
    try:
        server.start()
        yield server
    finally:
        server.kill()
