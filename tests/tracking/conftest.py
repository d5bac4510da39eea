"""One SQLite store for the session: creating one runs all of MLflow's migrations, which takes seconds."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.tracking.journal import Journal

Rows = list[tuple[str, int, float, int]]


@pytest.fixture(scope="session")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def store(store_dir: Path) -> str:
    """The address of a fresh SQLite store, made by the first delivery that needs it."""
    return f"sqlite:///{store_dir / 'mlflow.db'}"


@pytest.fixture(scope="session")
def metric_rows(store_dir: Path) -> Callable[[str], Rows]:
    """rows(run_id) -> (key, step, value, is_nan) of every metric row of a run, straight from the database."""

    def rows(run_id: str) -> Rows:
        query = "select key, step, value, is_nan from metrics where run_uuid = ? order by key, step"
        with sqlite3.connect(store_dir / "mlflow.db", timeout=20) as connection:
            return connection.execute(query, (run_id,)).fetchall()

    return rows


@pytest.fixture
def journal_only(tmp_path: Path) -> Callable[..., Path]:
    """make(name="run") -> the directory of a run that has a journal and has never been delivered."""

    def make(name: str = "run", steps: int = 5) -> Path:
        from pipeline.tracking.tracker import open_tracker

        with open_tracker(tmp_path / name, run_name=name, enabled=False) as tracker:
            tracker.params({"lr": 1e-5, "name": name})
            for step in range(steps):
                tracker.metrics(step, {"loss": 1 / (step + 1), "r@1": step / 10})
        return tmp_path / name

    return make


@pytest.fixture
def open_journal(tmp_path: Path) -> Callable[[], Journal]:
    return lambda: Journal(tmp_path)


@pytest.fixture
def python() -> Callable[..., subprocess.Popen[str]]:
    """start(code, *arguments) -> a Python process running `code`, its output piped."""

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start
