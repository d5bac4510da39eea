"""The environment of a cluster's processes: secrets are not passed on but named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tuning.cluster.environment import kept_back, passed_on, short_sockets

OPEN = {
    "SELORA_CACHE": "/scratch/cache",
    "SELORA_CACHE_GB": "20",
    "AWS_ENDPOINT_URL_S3": "http://minio:9000",
    "AWS_REGION": "eu-central-1",
    "AWS_PROFILE": "train",
    "AWS_SHARED_CREDENTIALS_FILE": "/etc/aws",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
    "HF_ENDPOINT": "https://hub.example.org",
    "HF_HOME": "/scratch/hf",
    "HF_TOKEN_PATH": "/etc/hf",
    "GOOGLE_APPLICATION_CREDENTIALS": "/etc/gcs.json",
    "GOOGLE_CLOUD_PROJECT": "p",
    "https_proxy": "http://proxy:3128",
    "NO_PROXY": "localhost",
    "REQUESTS_CA_BUNDLE": "/etc/ca.pem",
    "NCCL_SOCKET_IFNAME": "eth0",
}
SECRET = {
    "AWS_ACCESS_KEY_ID": "canary-1",
    "AWS_SECRET_ACCESS_KEY": "canary-2",
    "AWS_SESSION_TOKEN": "canary-3",
    "HF_TOKEN": "canary-4",
    "FSSPEC_S3_SECRET": "canary-5",
    "AZURE_STORAGE_KEY": "canary-6",
    "http_proxy": "http://me:canary-7@proxy:3128",
    "SELORA_PASSWORD": "canary-8",
}
HERE = {"PATH": "/bin", "HOME": "/root", "SELORA_SHIPPING_URI": "postgresql://me:canary-9@db/x", "SELORA_STOPPED": "/x"}


def test_endpoints_go_and_secrets_are_named() -> None:
    environment = OPEN | SECRET | HERE
    assert passed_on(environment) == OPEN
    assert kept_back(environment) == sorted(SECRET)
    assert "canary" not in str(passed_on(environment))


def test_a_tracking_address_goes_without_its_password() -> None:
    uri = {"MLFLOW_TRACKING_URI": "postgresql://me:canary@db/x", "MLFLOW_TRACKING_PASSWORD": "canary"}
    assert passed_on(uri) == {"MLFLOW_TRACKING_URI": "postgresql://me:***@db/x"}
    assert kept_back(uri) == []


def test_what_ray_is_given_holds_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.tuning.cluster.connect import _init_settings, _name_secrets
    from pipeline.tuning.grid import Resources

    for name, value in (OPEN | SECRET | HERE).items():
        monkeypatch.setenv(name, value)
    settings = _init_settings("10.0.0.1:6379", Resources())
    assert settings["runtime_env"]["env_vars"].items() >= OPEN.items()
    # A process that reserves no GPU sees none.
    assert settings["runtime_env"]["env_vars"]["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"
    assert "canary" not in str(settings)
    _name_secrets()
    told = capsys.readouterr().err
    assert told.startswith("AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,")
    assert "canary" not in told


def test_a_long_tmpdir_gets_short_sockets(tmp_path: Path) -> None:
    """A long TMPDIR gets short sockets for the time of the cluster."""
    long = tmp_path / ("d" * 60)
    long.mkdir()
    environment = {"TMPDIR": str(long)}
    with short_sockets(environment):
        place = Path(environment["RAY_TMPDIR"])
        assert environment["TMPDIR"] == str(place)
        assert place.stat().st_mode & 0o777 == 0o700
        name = f"session_2026-11-26_15-30-00_123456_{2**22}"
        sockets = place / "ray" / name / "sockets"
        sockets.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(sockets / "plasma_store"))
    assert not place.exists()
    assert environment == {"TMPDIR": str(long)}


def test_the_longest_directory_that_is_let_through_fits() -> None:
    """One byte more is refused where the user named it, with the variable."""
    from pipeline.tuning.cluster.environment import _LONGEST_TMP

    place = "/" + "t" * (_LONGEST_TMP - 1)
    environment = {"RAY_TMPDIR": place}
    with short_sockets(environment):
        assert environment == {"RAY_TMPDIR": place}
    path = f"{place}/ray/session_2026-11-26_15-30-00_123456_{2**22}/sockets/plasma_store"
    assert len(path) == 107
    with pytest.raises(ConfigError, match=rf"RAY_TMPDIR={place}t: .* at most {_LONGEST_TMP} bytes"):
        with short_sockets({"RAY_TMPDIR": place + "t"}):
            pass


def test_without_a_short_directory_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # of /tmp and the like
    with pytest.raises(ConfigError, match="set RAY_TMPDIR to a directory of at most"):
        with short_sockets({"TMPDIR": "/" + "d" * 90}):
            pass
