"""A cluster that cannot be used from here is reported at once, with the way out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tuning.cluster.ray_errors import check_reachable


def test_an_address_where_nobody_listens_is_refused() -> None:
    with socket.socket() as bound:  # not listening: it only keeps the port from everybody else
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot use the Ray cluster at {address}: Connection refused; is its"):
            check_reachable(address)


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1", "http://127.0.0.1:1"])
def test_what_is_no_host_and_port_is_left_to_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(socket, "create_connection", lambda *arguments, **_: called.append(arguments))
    check_reachable(address)
    assert not called


def test_a_client_without_the_token_is_told_about_it(tmp_path: Path) -> None:
    """Here Ray's client refuses itself; that a cluster does, tests/launch/test_ray_hosts.py shows."""
    code = (
        "import sys; from pipeline.config import ConfigError; from pipeline.tuning.grid import Resources\n"
        "from pipeline.tuning.cluster.connect import cluster\n"
        "try: cluster(sys.argv[1], Resources()).__enter__()\n"
        "except ConfigError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-c", code, address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot use the Ray cluster at {address}: the token is missing or not the cluster's")
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in done.stdout
