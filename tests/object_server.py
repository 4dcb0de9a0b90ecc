"""A real S3-speaking server (moto's) on loopback, and a proxy before it that makes it a bad one."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

BUCKET = "bucket"
HOPS = {"connection", "transfer-encoding", "keep-alive"}


@dataclass(frozen=True)
class ObjectServer:
    """A server that runs: where it answers, and the environment in which it is found."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """moto's server in a process of its own, with one bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _make_bucket(port)
        yield ObjectServer(port)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _make_bucket(port: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(
                "PUT", f"/{BUCKET}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/x/us-east-1/s3/x"}
            )
            answer = connection.getresponse()
            answer.read()
            connection.close()
            assert answer.status == 200
            return
        time.sleep(0.1)
    raise AssertionError("moto's server does not answer")


class BadProxy(ThreadingHTTPServer):
    """Passes requests on to a server; every `every`th meets its fault.

    fault: a status such as "503" (the whole answer), "drop" (the connection ends without an answer), "half" (the answer
    ends in the middle), "slow" (it waits a second), "down" (every one is dropped).
    """

    daemon_threads = True

    def __init__(self, behind: ObjectServer, fault: str, every: int = 20) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.fault, self.every = behind.port, fault, every
        self.requests, self.faults, self.seen = 0, 0, list[tuple[str, str]]()
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def server(self) -> ObjectServer:
        return ObjectServer(self.server_address[1])

    def meets_fault(self, method: str, path: str) -> bool:
        with self._lock:
            self.requests += 1
            self.seen.append((method, unquote(path.partition("?")[0]).removeprefix(f"/{BUCKET}/")))
            bad = self.fault == "down" or self.requests % self.every == 0
            self.faults += bad
            return bad

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault if self.server.meets_fault(self.command, self.path) else ""
        if fault in ("drop", "down"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "slow":
            time.sleep(1)
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOPS}
        behind.request(self.command, self.path, body, headers)
        answer = behind.getresponse()
        data = answer.read()
        behind.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOPS | {"content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "half" and len(data) > 1:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def put_files(server: ObjectServer, files: dict[str, bytes]) -> None:
    """Objects by key, put past our own code."""
    import boto3

    client = boto3.client("s3", endpoint_url=server.environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
                          aws_access_key_id="test", aws_secret_access_key="not-a-secret")  # fmt: skip
    for key, data in files.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=data)
    client.close()
