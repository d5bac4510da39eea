"""Messages about a store that cannot be used: its address and the way out."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tracking.mlflow.reader import read_experiment
from pipeline.tracking.mlflow.registry import load_registered
from pipeline.tracking.mlflow.shipper import LOG_FILE
from pipeline.tracking.mlflow.store import Away, MlflowStore
from pipeline.tracking.mlflow.sync import sync
from pipeline.tracking.mlflow.uris import checked_uri
from pipeline.tracking.tracker import open_tracker


@pytest.fixture
def other_schema(store: str, store_dir: Path, tmp_path: Path) -> Callable[[str], str]:
    """make(revision) -> the address of a store whose tables have that revision."""
    MlflowStore(store, "selora").find_runs("none")

    def make(revision: str) -> str:
        copy = tmp_path / "other.db"
        shutil.copy(store_dir / "mlflow.db", copy)
        with sqlite3.connect(copy) as connection:
            connection.execute("update alembic_version set version_num = ?", (revision,))
        return f"sqlite:///{copy}"

    return make


def test_tables_of_another_mlflow_name_the_command(
    other_schema: Callable[[str], str], journal_only: Callable[..., Path]
) -> None:
    """Tables of another MLflow come with the command for them."""
    uri = other_schema("acf3f17fdcc7")
    advice = f"its tables are of another MLflow: back it up, then run `mlflow db upgrade '{uri}'`"
    with pytest.raises(ConfigError) as caught:
        read_experiment("selora", uri)
    assert str(caught.value) == f"{uri}: {advice}"
    report = sync(journal_only(), uri)
    assert not report.complete
    assert report.error == advice


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x8f\x11 no database \x00" * 500, "it is not a SQLite database: name another file, or move it away"),
        (None, "its file is damaged: restore a backup, or move it away"),
    ],
)
def test_a_corrupt_database_is_told_at_once(
    content: bytes | None, reason: str, other_schema: Callable[[str], str], journal_only: Callable[..., Path]
) -> None:
    """Garbage, and a database cut off in the middle; MLflow alone would try for minutes. The file stays as it is."""
    uri = other_schema("0")
    file = Path(uri.removeprefix("sqlite:///"))
    file.write_bytes(file.read_bytes()[:100_000] if content is None else content)
    found = file.read_bytes()
    began = time.monotonic()
    report = sync(journal_only(), uri)
    assert report.error is not None and report.error.startswith(reason)
    assert "`selora track sync RUN --full`" in report.error
    for call in (lambda: read_experiment("selora", uri), lambda: load_registered("models:/m@champion", uri)):
        with pytest.raises(ConfigError, match=re.escape(f"{uri}: {reason}")):
            call()
    assert time.monotonic() - began < 60
    assert file.read_bytes() == found


def test_a_model_of_another_store_is_told(store: str) -> None:
    MlflowStore(store, "selora").find_runs("none")
    with pytest.raises(ConfigError, match=r"models:/m@champion: cannot be loaded .*--uri gives the address of another"):
        load_registered("models:/m@champion", store)


def test_a_locked_database_names_what_to_do(store: str, journal_only: Callable[..., Path], monkeypatch) -> None:
    """Another program holds the lock, the journal keeps all, and the next sync delivers it."""
    MlflowStore(store, "selora").find_runs("none")
    monkeypatch.setattr("pipeline.tracking.mlflow.moved._LOCKED_SECONDS", 0.2)
    text = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('begin exclusive');"
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", text, store.removeprefix("sqlite:///")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        report = sync(run := journal_only("locked"), store)
        other.communicate(b"\n")
    assert report.error == "another program keeps the database locked: end it, or wait until it is done"
    assert report.pending > 0
    assert sync(run, store).complete


def test_a_database_deleted_while_it_is_open_is_noticed(store: str, store_dir: Path) -> None:
    """SQLite would go on writing into a file without a name."""
    MlflowStore(store, "selora").find_runs("none")
    copy = store_dir / "deleted.db"
    shutil.copy(store_dir / "mlflow.db", copy)
    opened = MlflowStore(f"sqlite:///{copy}", "selora")
    opened.find_runs("none")
    copy.rename(store_dir / "elsewhere.db")
    for _ in range(2):
        with pytest.raises(Away, match=r"removed or replaced while it was open; `selora track sync RUN` fills the new"):
            opened.find_runs("none")
        shutil.copy(store_dir / "mlflow.db", copy)


def test_a_directory_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory; name a file in it, as in sqlite:///"):
        checked_uri(f"sqlite:///{tmp_path}", tmp_path)


def test_the_log_says_why_a_late_shipment_was_ended(tmp_path: Path, monkeypatch, caplog) -> None:
    """The process is ended while it imports, before it could write a word of its own."""
    monkeypatch.setattr("pipeline.tracking.tracker._FILE_WAIT_SECONDS", 0.0)
    with open_tracker(tmp_path / "run", run_name="run", uri=f"sqlite:///{tmp_path}/m.db") as tracker:
        tracker.metrics(0, {"loss": 1.0})
    assert f"it took too long, see {tmp_path / 'run' / LOG_FILE}" in caplog.text
    first, last = (tmp_path / "run" / LOG_FILE).read_text().splitlines()
    assert first.endswith(f"started for {tmp_path / 'run'}, delivering to sqlite:///{tmp_path}/m.db")
    assert last.endswith("not done 0 s after the end of the run, and ended")


def test_the_log_holds_no_password(tmp_path: Path) -> None:
    uri = "postgresql://me:canary@127.0.0.1:9/db"
    with open_tracker(tmp_path / "run", run_name="run", uri=uri) as tracker:
        tracker.metrics(0, {"loss": 1.0})
    assert "canary" not in (tmp_path / "run" / LOG_FILE).read_text()
    assert "me:***@127.0.0.1" in (tmp_path / "run" / LOG_FILE).read_text()
