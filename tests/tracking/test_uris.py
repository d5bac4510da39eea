from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from pipeline.config import ConfigError
from pipeline.passwords import redact
from pipeline.tracking.mlflow.store import MlflowStore
from pipeline.tracking.mlflow.uris import artifact_root, resolve_uri, sqlite_path
from pipeline.tracking.tracker import open_tracker


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlruns", "no longer keeps runs in plain directories"),
        ("file:///tmp/mlruns", "no longer keeps runs in plain directories"),
        ("file:mlruns", "no longer keeps runs in plain directories"),
        ("http://", "names no host"),
        ("http://host:many", "Port could not be cast"),
        ("http://ho st:5000", "names no host"),
        ("sqlite://", "name a file"),
        ("sqlite:///", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("postgresql+nosuchdriver://host/db", "nosuchdriver"),
        ("htp://host", "unknown scheme 'htp'"),
    ],
)
def test_malformed_address_is_refused_before_anything_is_written(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_tracker(tmp_path / "run", run_name="run", uri=uri)
    assert not (tmp_path / "run").exists()


def test_password_never_shows_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_uri("htp://me:secret@host", tmp_path)
    assert "secret" not in str(caught.value)
    assert redact("at postgresql://me:s3cret@db/x and http://h") == "at postgresql://me:***@db/x and http://h"


def test_server_that_does_not_answer_is_no_config_error(tmp_path: Path) -> None:
    assert resolve_uri("http://127.0.0.1:9/", tmp_path) == "http://127.0.0.1:9"


def test_the_environment_precedes_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default store is next to the runs and the environment goes before it."""
    monkeypatch.chdir(tmp_path)
    uri = resolve_uri(None, Path("runs"))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert artifact_root(uri, Path("runs")) == f"{tmp_path}/runs/mlartifacts"
    assert resolve_uri("sqlite:///near.db", Path("runs")) == f"sqlite:///{tmp_path}/near.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert resolve_uri(None, Path("runs")) == "https://mlflow.example.org"
    assert artifact_root("https://mlflow.example.org", Path("runs")) is None


NAMES = ("a?b", "a%20b", "50%", "%25", "c#d", "[x]", "{y}", "sp ace", "ünï", "日本", "a&b=c+d;e:@f", "100%?")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_directory_comes_back_from_its_address(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    out.mkdir()
    uri = resolve_uri(None, out)
    assert (sqlite_path(uri), resolve_uri(uri, tmp_path)) == (out / "mlflow.db", uri)
    root = artifact_root(uri, out)
    assert root is not None
    assert Path(url2pathname(urlsplit(root).path if root.startswith("file:") else root)) == out / "mlartifacts"


def test_mlflow_keeps_everything_below_out_whatever_its_name(tmp_path: Path) -> None:
    """Database, lock and artifacts: nothing next to OUT, nothing in a directory of a decoded name."""
    out = tmp_path / "a?b%20#c [d] {e} ü"
    out.mkdir()
    file = out / "what is 50% ?.txt"
    file.write_text("x")
    store = MlflowStore(resolve_uri(None, out), "an experiment: 100%? [x]", out)
    run = store.create_run("uuid", "{name} %20", 1)
    store.upload(run, file, "")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert [path.name for path in (out / "mlartifacts").rglob("*.txt")] == [file.name]
    assert (out / "mlflow.db").stat().st_size > 0


def test_a_bare_database_gets_a_driver_and_a_file_store(tmp_path: Path) -> None:
    """Bare database gets the driver that is there and a place for files."""
    uri = resolve_uri("postgresql://me:secret@host/db", tmp_path)
    assert uri == "postgresql+psycopg2://me:secret@host/db"
    assert artifact_root(uri, tmp_path) == f"{tmp_path}/mlartifacts"
    assert resolve_uri(uri, tmp_path) == uri
