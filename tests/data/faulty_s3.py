"""A real S3 server (rclone's) on loopback, and a proxy before it that fails as object stores do.

A request in twenty gets 503 SlowDown, an answer that breaks off, or a reset in the middle; as many are slow.
"""

from __future__ import annotations

import http.client
import itertools
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from http_servers import QuietHandler, serving

KEY, SECRET = "selora-test", "a secret of this test"
FAULTS = ("503", "cut", "reset")
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"


def rclone() -> str | None:
    """The program, from the development group."""
    return shutil.which("rclone", path=str(Path(sys.executable).parent))


@dataclass
class FaultyStore:
    """``root/BUCKET/KEY`` is s3://BUCKET/KEY behind ``url``. ``done``: requests by what was done to them. ``served``:
    whole answers by path. ``asked`` is called with the path of each request before it is answered: it may wait, and
    name a fault."""

    root: Path
    url: str
    errors: float = 0.05
    slow: float = 0.05
    done: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    kinds: Iterator[str] = field(default_factory=lambda: itertools.cycle(FAULTS))
    asked: Callable[[str], str | None] = lambda path: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def environment(self) -> dict[str, str]:
        """What a user would set for a store of his own."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def faults(self) -> int:
        """Requests that failed."""
        return sum(self.done[kind] for kind in FAULTS)

    def choose(self, path: str, named: str | None) -> str:
        with self.lock:
            number = self.draw.random()
            drawn = next(self.kinds) if number < self.errors else "slow" if number < self.errors + self.slow else ""
            kind = drawn if named is None else named
            self.done[kind] += 1
            if kind not in FAULTS:
                self.served[path] += 1
            return kind


@contextmanager
def faulty_store(folder: Path) -> Iterator[FaultyStore]:
    """The server and the proxy, until the block ends."""
    program = rclone()
    assert program is not None
    root = folder / "buckets"
    root.mkdir(parents=True)
    port = _free_port()
    command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", ""]
    with (folder / "rclone.log").open("wb") as log:
        server = subprocess.Popen([*command, str(root)], stdout=log, stderr=log)
    try:
        _wait_for(port, folder / "rclone.log")
        store = FaultyStore(root, "")
        with serving(type("Proxy", (_Proxy,), {"store": store, "port": port})) as address:
            store.url = f"http://{address}"
            yield store
    finally:
        server.terminate()
        server.wait()


class _Proxy(QuietHandler):
    protocol_version = "HTTP/1.1"
    store: FaultyStore
    port: int

    def do_HEAD(self) -> None:
        self.pass_on()

    def do_GET(self) -> None:
        self.pass_on()

    def pass_on(self) -> None:
        fault = self.store.choose(self.path, self.store.asked(self.path))
        if fault == "503":
            self.send(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        status, headers, body = self.ask()
        if fault == "slow":
            self.send_slowly(status, headers, body)
        elif fault in ("cut", "reset"):
            self.break_off(status, headers, body, reset=fault == "reset")
        else:
            self.send(status, headers, body)

    def ask(self) -> tuple[int, dict[str, str], bytes]:
        behind = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        # Headers as they are: they are signed.
        behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            behind.putheader(name, value)
        behind.endheaders()
        answer = behind.getresponse()
        body, headers = answer.read(), dict(answer.getheaders())
        behind.close()
        for name in ("Transfer-Encoding", "Connection"):
            headers.pop(name, None)
        headers.setdefault("Content-Length", str(len(body)))
        return answer.status, headers, body

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.head(status, {"Content-Length": str(len(body))} | headers)
        if self.command == "GET":
            self.wfile.write(body)

    def send_slowly(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.head(status, headers)
        for start in range(0, len(body), max(1, len(body) // 4)):
            self.wfile.write(body[start : start + max(1, len(body) // 4)])
            self.wfile.flush()
            time.sleep(0.05)

    def break_off(self, status: int, headers: dict[str, str], body: bytes, *, reset: bool) -> None:
        self.head(status, headers)
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if reset:
            time.sleep(0.02)  # a reset overtakes what was sent just before it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _wait_for(port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
