"""What a store that cannot be used says: its address, and what to do about it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tracking.mlflow.reader import read_experiment
from pipeline.tracking.mlflow.shipper import LOG_FILE
from pipeline.tracking.mlflow.store import MlflowStore
from pipeline.tracking.mlflow.sync import sync
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
