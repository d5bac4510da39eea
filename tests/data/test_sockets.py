"""Sockets of one machine: addresses stay short with a long TMPDIR, and no proxy is used for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from http_servers import QuietHandler, serving

from pipeline.sockets import reach_loopback

SCRIPT = """
import tempfile, torch
from multiprocessing import util
from pipeline.data.batches import Batches

def make(ids):
    return torch.tensor(ids)

if __name__ == "__main__":
    print([int(batch.sum()) for batch in Batches(make, [[1, 2], [3], [4], [5]], workers=2)])
    print(util.get_temp_dir())
    print(tempfile.gettempdir())
"""


@pytest.mark.parametrize("length", [20, 90])
def test_workers_pass_tensors_whatever_the_length_of_tmpdir(tmp_path: Path, repository: Path, length: int) -> None:
    long = tmp_path / ("t" * length)
    long.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"TMPDIR": str(long), "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    values, sockets, temporary = done.stdout.splitlines()
    assert values == "[3, 3, 4, 5]"
    assert temporary == str(long), "only the sockets move"
    assert len(sockets) + len("/listener-01234567") <= 107
    assert not Path(sockets).exists(), "the directory ends with its process"


class _Here(QuietHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()


@pytest.mark.parametrize("given", [{}, {"no_proxy": "intern"}, {"NO_PROXY": "intern, ::1"}])
def test_http_proxy_is_not_asked_for_loopback(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is a port where nobody listens."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"http_proxy": "http://127.0.0.1:9", **given}.items():
        monkeypatch.setenv(name, value)
    for name in ("no_proxy", "NO_PROXY"):  # what is set below is also taken back
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with serving(_Here) as server:
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(f"http://{server}/", timeout=10)
        reach_loopback(os.environ)
        assert requests.get(f"http://{server}/", timeout=10).status_code == 204
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    assert os.environ["no_proxy"].split(",").count("::1") == 1
    assert ("intern" in os.environ["no_proxy"].split(",")) == bool(given)


def test_without_a_proxy_the_environment_stays() -> None:
    environment = {"HTTP_PROXY": "", "PATH": "x"}
    reach_loopback(environment)
    assert environment == {"HTTP_PROXY": "", "PATH": "x"}
