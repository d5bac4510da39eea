"""A directory of runs, moved with its SQLite store: files are found, and a sync goes where the runs are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking.identity import read_identity
from pipeline.tracking.mlflow.delivery import load_state
from pipeline.tracking.mlflow.moved import found_again, relocate
from pipeline.tracking.mlflow.reader import read_experiment
from pipeline.tracking.mlflow.store import MlflowStore
from pipeline.tracking.mlflow.sync import sync
from pipeline.tracking.mlflow.uris import sqlite_uri
from pipeline.tracking.tracker import SHIPPED_VARIABLE, open_tracker


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[Path, str]:
    """OUT with a run whose file is in MLflow, and its id, after `mv OUT NEW`."""
    before, after = tmp_path_factory.mktemp("before") / "runs", tmp_path_factory.mktemp("after") / "new place %20"
    run = before / "run"
    note = before / "note.txt"
    before.mkdir()
    note.write_text("kept")
    uri = sqlite_uri(before / "mlflow.db")
    monkey = pytest.MonkeyPatch()
    monkey.setenv(SHIPPED_VARIABLE, "by the sync below")
    with open_tracker(run, run_name="run", uri=uri) as tracker:
        tracker.metrics(0, {"loss": 1.0})
        tracker.artifact(note)
    monkey.undo()
    # In a process of its own: MLflow remembers for the life of a process where the files of a run are.
    command = [sys.executable, "-m", "pipeline", "track", "sync", str(run)]
    subprocess.run(command, cwd=repository, check=True)
    run_id = load_state(run, uri).run_id
    shutil.move(before, after)
    return after, str(run_id)


def test_files_are_found_next_to_the_store(moved: tuple[Path, str]) -> None:
    out, _ = moved
    (found,) = read_experiment("selora", sqlite_uri(out / "mlflow.db"), files=("note.txt",))
    assert found.files == {"note.txt": "kept"}


def test_a_sync_goes_to_the_moved_store_and_makes_no_other(moved: tuple[Path, str]) -> None:
    out, run_id = moved
    report = sync(out / "run")
    assert (report.uri, report.run_id, report.pending) == (sqlite_uri(out / "mlflow.db"), run_id, 0)
    assert not list(out.parents[1].glob("before*/runs")), "nothing is made anew where the runs were"


def test_a_later_stage_finds_the_store_of_a_moved_run(moved: tuple[Path, str], monkeypatch) -> None:
    """An evaluation gives the address that the run's config has kept, as a trial of a moved sweep does."""
    out, _ = moved
    monkeypatch.setenv(SHIPPED_VARIABLE, "by nobody")
    old = next(out.parents[1].glob("before*")) / "runs" / "mlflow.db"
    with open_tracker(out / "run", run_name="run", uri=sqlite_uri(old), owns_status=False) as tracker:
        tracker.metrics(1, {"eval/x/acc1": 0.5})
    identity = read_identity(out / "run")
    assert identity is not None and identity.uri == sqlite_uri(out / "mlflow.db")
    assert not old.parent.exists(), "nothing is made anew where the runs were"


def test_new_files_go_next_to_the_moved_store(moved: tuple[Path, str]) -> None:
    out, run_id = moved
    store = MlflowStore(sqlite_uri(out / "mlflow.db"), "selora", out)
    (out / "more.txt").write_text("more")
    store.upload(run_id, out / "more.txt", "")
    assert len(list((out / "mlartifacts").rglob("more.txt"))) == 1


def test_a_copy_is_not_turned_away_from_its_original(moved: tuple[Path, str], tmp_path: Path) -> None:
    out, run_id = moved
    relocate(sqlite_uri(out / "mlflow.db"))
    shutil.copytree(out, tmp_path / "copy")
    uri = sqlite_uri(tmp_path / "copy" / "mlflow.db")
    relocate(uri)
    artifacts = MlflowStore(uri, "selora").get_run(run_id).info.artifact_uri
    assert str(artifacts).startswith((out / "mlartifacts").as_uri())


def test_an_address_that_is_no_lost_file_stays(tmp_path: Path) -> None:
    assert found_again(None, tmp_path) is None
    assert found_again("http://host", tmp_path) == "http://host"
    gone = sqlite_uri(tmp_path / "x" / "mlflow.db")
    assert found_again(gone, tmp_path / "run") == gone
