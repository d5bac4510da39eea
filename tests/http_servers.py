"""HTTP servers of one test: started on a free port of 127.0.0.1 and stopped at the end."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class QuietHandler(BaseHTTPRequestHandler):
    """Base of all handlers; prints no line for each request."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        pass


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with `handler` in a thread of this process; yields HOST:PORT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _GuardedFiles(QuietHandler, SimpleHTTPRequestHandler):
    """Files for the user `me` with a password; 401 for all others."""

    password: str

    def do_GET(self) -> None:
        wanted = "Basic " + base64.b64encode(f"me:{self.password}".encode()).decode()
        if self.headers.get("Authorization") != wanted:
            self.send_error(401)
        elif self.command == "HEAD":
            super().do_HEAD()
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        self.do_GET()


def serving_guarded(folder: Path, password: str) -> AbstractContextManager[str]:
    """Serve the files of a folder to the user `me` with the password; yields HOST:PORT."""
    handler = type("Handler", (_GuardedFiles,), {"password": password})
    return serving(partial(handler, directory=str(folder)))
