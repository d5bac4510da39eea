"""Journals delivered to a real SQLite store by sync()."""

from __future__ import annotations

import json
import math
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import ConfigError
from pipeline.tracking.identity import RUN_FILE, ensure_identity, read_identity
from pipeline.tracking.journal import JOURNAL, Journal
from pipeline.tracking.mlflow.delivery import STATE_FILE
from pipeline.tracking.mlflow.sync import SyncReport, sync, sync_all
from pipeline.tracking.tracker import NullTracker, open_tracker

if TYPE_CHECKING:
    from mlflow.entities import Run

Rows = Callable[[str], list[tuple[str, int, float, int]]]
Make = Callable[..., Path]
Start = Callable[..., subprocess.Popen[str]]


def mlflow_run(store: str, report: SyncReport) -> Run:
    from mlflow import MlflowClient

    assert report.run_id is not None
    return MlflowClient(store).get_run(report.run_id)


def test_every_value_arrives_once_under_a_legal_name(tmp_path: Path, store: str, metric_rows: Rows) -> None:
    """Every value arrives once under a legal name with params tags and status."""
    with open_tracker(tmp_path / "run", run_name="whole", enabled=False, extra_tags={"kind": "trial"}) as tracker:
        tracker.params({"lr": 1e-5, "none": None, "templates": "x" * 7000, "uri": "http://me:secret@host"})
        tracker.tags({"seed": 1})
        for step in range(2500):  # more than one batch of 1000
            tracker.metrics(step, {"loss": 1 / (step + 1), "r@1": float(step)})
        tracker.metrics(7, {"bad": math.nan, "up": math.inf})
    report = sync(tmp_path / "run", store)
    assert (report.error, report.pending, report.already, report.sent) == (None, 0, 0, 5000 + 2 + 4 + 2)
    rows = metric_rows(str(report.run_id))
    assert [(key, step, value) for key, step, value, _ in rows if key == "r_at_1"] == [
        ("r_at_1", step, float(step)) for step in range(2500)
    ]
    assert [(key, step) for key, step, _, _ in rows if key == "loss"] == [("loss", step) for step in range(2500)]
    assert [(step, bool(is_nan)) for key, step, _, is_nan in rows if key == "bad"] == [(7, True)]
    run = mlflow_run(store, report)
    assert run.data.params["lr"] == "1e-05"
    assert run.data.params["uri"] == "http://me:***@host"
    assert len(run.data.params["templates"]) == 6000
    assert (run.data.tags["kind"], run.data.tags["seed"]) == ("trial", "1")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "whole")
    assert run.info.end_time is not None
    assert run.info.start_time is not None
    assert run.info.end_time >= run.info.start_time
    again = sync(tmp_path / "run", store)
    assert (again.sent, again.already, again.pending) == (0, report.sent, 0)


def test_second_delivery_of_everything_changes_nothing(
    journal_only: Make, store: str, metric_rows: Rows, tmp_path: Path
) -> None:
    run_dir = journal_only()
    journal = Journal(run_dir)
    journal.metrics(9, {"bad": math.nan, "up": math.inf, "down": -math.inf})
    journal.close()
    first = sync(run_dir, store)
    rows = metric_rows(str(first.run_id))
    (run_dir / STATE_FILE).unlink()  # the position is lost with the disk's last minutes
    second = sync(run_dir, store)
    third = sync(run_dir, store, full=True)
    assert first.run_id == second.run_id == third.run_id
    assert first.sent == second.sent == third.sent
    assert metric_rows(str(first.run_id)) == rows
    assert len(rows) == 5 * 2 + 3


def test_kill_between_sending_and_remembering_doubles_nothing(
    journal_only: Make, store: str, metric_rows: Rows, python: Start
) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking.mlflow import delivery
from pipeline.tracking.mlflow import store as mlflow_store
from pipeline.tracking.mlflow.sync import sync
original = mlflow_store.MlflowStore.log_metrics
def send_and_die(self, run_id, metrics):
    original(self, run_id, metrics)
    print("sent", len(metrics), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
mlflow_store.MlflowStore.log_metrics = send_and_die
sync(Path(sys.argv[1]), sys.argv[2])
"""
    run_dir = journal_only(steps=20)
    victim = python(code, run_dir, store)
    output = victim.communicate()[0]
    assert (victim.returncode, output.strip().splitlines()[-1]) == (-signal.SIGKILL, "sent 40")
    state = json.loads((run_dir / STATE_FILE).read_text())[store]
    assert state["offsets"] == {}  # nothing of the sent batch was remembered
    assert len(metric_rows(state["run_id"])) == 40
    journal = Journal(run_dir)
    journal.metrics(20, {"loss": 0.0})
    journal.close()
    report = sync(run_dir, store)
    assert report.run_id == state["run_id"]
    steps = [(key, step) for key, step, _, _ in metric_rows(state["run_id"])]
    assert steps == [("loss", step) for step in range(21)] + [("r_at_1", step) for step in range(20)]


def test_a_changed_param_of_a_resumed_run_is_noted(journal_only: Make, store: str) -> None:
    """Changed param of a resumed run is noted and does not raise."""
    run_dir = journal_only()
    sync(run_dir, store)
    for workers in ("4", "8"):
        with open_tracker(run_dir, run_name="run", enabled=False) as tracker:
            tracker.params({"lr": 1e-5, "workers": workers})
    for report in (sync(run_dir, store), sync(run_dir, store, full=True)):
        run = mlflow_run(store, report)
        assert report.refused == ()
        assert (run.data.params["lr"], run.data.params["workers"]) == ("1e-05", "4")
        assert run.data.tags["param_changed.workers"] == "8 (was 4)"
        assert "param_changed.lr" not in run.data.tags


def test_file_is_uploaded_again_only_when_its_content_changed(journal_only: Make, store: str, store_dir: Path) -> None:
    run_dir = journal_only()

    def record(text: str) -> SyncReport:
        (run_dir / "gates").mkdir(exist_ok=True)
        (run_dir / "gates" / "map.json").write_text(text)
        with open_tracker(run_dir, run_name="run", enabled=False) as tracker:
            tracker.artifact(run_dir / "gates", "maps")
        return sync(run_dir, store)

    first = record("{}")
    [uploaded] = store_dir.glob(f"mlartifacts/{first.run_id}/artifacts/maps/gates/map.json")
    before = uploaded.stat().st_mtime_ns
    assert record("{}").sent == 0
    assert uploaded.stat().st_mtime_ns == before
    assert record("{1}").sent == 1
    assert uploaded.read_text() == "{1}"
    (run_dir / "gates" / "map.json").write_text("{2}")
    with open_tracker(run_dir, run_name="run", enabled=False) as tracker:
        tracker.artifact(run_dir / "gates" / "map.json")
    (run_dir / "gates" / "map.json").unlink()
    gone = sync(run_dir, store)
    assert gone.pending == 0
    assert "is gone" in gone.refused[0]


def test_failed_upload_holds_back_neither_numbers_nor_status(
    journal_only: Make, store: str, store_dir: Path, metric_rows: Rows
) -> None:
    run_dir = journal_only()
    first = sync(run_dir, store)
    blocked = store_dir / "mlartifacts" / str(first.run_id)
    blocked.write_text("a file where the folder should be")
    with open_tracker(run_dir, run_name="run", enabled=False) as tracker:
        tracker.artifact(run_dir / RUN_FILE)
        tracker.metrics(99, {"loss": 0.5})
        tracker.finish("FAILED")
    report = sync(run_dir, store)
    assert report.error is not None
    assert "run.json" in report.error
    assert (report.pending, report.sent) == (1, 1)
    assert ("loss", 99, 0.5, 0) in metric_rows(str(report.run_id))
    assert mlflow_run(store, report).info.status == "FAILED"
    blocked.unlink()
    assert sync(run_dir, store).complete


def test_a_refused_value_does_not_hold_up_the_others(journal_only: Make, store: str, metric_rows: Rows) -> None:
    """One value that MLflow refuses does not hold up the others."""
    run_dir = journal_only(steps=8)
    lines = (run_dir / JOURNAL).read_text().splitlines()
    broken = [json.loads(line) for line in lines]
    [victim] = [record for record in broken if record["kind"] == "metrics" and record["step"] == 3]
    victim["time_ms"] = -5
    (run_dir / JOURNAL).write_text("\n".join(map(json.dumps, broken)) + "\n")
    report = sync(run_dir, store)
    assert report.complete
    assert len(report.refused) == 2
    assert report.refused[0].startswith("metric loss at step 3:")
    steps = [step for key, step, _, _ in metric_rows(str(report.run_id)) if key == "loss"]
    assert steps == [0, 1, 2, 4, 5, 6, 7]


def test_corrupt_line_is_reported_and_the_rest_delivered(journal_only: Make, store: str, metric_rows: Rows) -> None:
    run_dir = journal_only()
    lines = (run_dir / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[4] = b"\xff\xfe garbage\n"
    (run_dir / JOURNAL).write_bytes(b"".join(lines) + b'{"seq": 99, "ti')  # and a torn end
    report = sync(run_dir, store)
    assert report.corrupt == (f"{JOURNAL} line 5 cannot be read",)
    assert "line 5" in str(report)
    assert report.pending == 0
    assert len(metric_rows(str(report.run_id))) == 8


def put_below(parent: Path, child: Path) -> None:
    """Record the parent of a run before it starts, as a sweep does for its trials."""
    above = read_identity(parent)
    assert above is not None
    child.mkdir()
    ensure_identity(child, child.name, "selora", None, above.run)


def test_children_hang_below_their_parent_whichever_comes_first(tmp_path: Path, store: str) -> None:
    with open_tracker(tmp_path / "sweep", run_name="sweep", enabled=False) as sweep:
        for name in ("a_trial", "b_trial"):
            child = tmp_path / "sweep" / name
            put_below(tmp_path / "sweep", child)
            with open_tracker(child, run_name=name, enabled=False) as tracker:
                tracker.metrics(0, {"loss": 1.0})
        sweep.tags({"kind": "sweep"})
    early = sync(tmp_path / "sweep" / "a_trial", store)
    assert "mlflow.parentRunId" not in mlflow_run(store, early).data.tags
    with open_tracker(tmp_path / "sweep" / "a_trial", run_name="a_trial", enabled=False) as tracker:
        tracker.metrics(1, {"loss": 0.5})
    sync(tmp_path / "sweep", store)
    reports = sync_all([tmp_path / "sweep" / "a_trial", tmp_path / "sweep" / "b_trial"], store)
    parent = sync(tmp_path / "sweep", store).run_id
    assert [mlflow_run(store, report).data.tags["mlflow.parentRunId"] for report in reports] == [parent, parent]


def test_directory_of_runs_is_synced_whole_parents_first(tmp_path: Path, journal_only: Make, store: str) -> None:
    first, second = journal_only("one"), journal_only("two")
    nested = tmp_path / "aaa"
    put_below(second, nested)
    with open_tracker(nested, run_name="child", enabled=False):
        pass
    reports = sync_all([tmp_path], store)
    assert [report.run_dir for report in reports] == [first, second, nested]
    assert all(report.complete for report in reports)
    assert mlflow_run(store, reports[2]).data.tags["mlflow.parentRunId"] == reports[1].run_id
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a run"):
        sync_all([tmp_path / "empty"], store)
    with pytest.raises(ConfigError, match="not the directory of a tracked run"):
        sync(tmp_path, store)


def test_a_run_without_a_writer_is_closed_as_killed(tmp_path: Path, store: str) -> None:
    """Run without a living writer is closed as killed and a resumed one runs again."""
    tracker = open_tracker(tmp_path / "run", run_name="run", enabled=False)
    tracker.metrics(0, {"loss": 1.0})
    assert mlflow_run(store, sync(tmp_path / "run", store)).info.status == "RUNNING"
    tracker._journal.close()  # what the kernel does for a killed process
    assert mlflow_run(store, sync(tmp_path / "run", store)).info.status == "KILLED"
    resumed = open_tracker(tmp_path / "run", run_name="run", enabled=False)
    assert mlflow_run(store, sync(tmp_path / "run", store)).info.status == "RUNNING"
    resumed.finish("FAILED")
    assert mlflow_run(store, sync(tmp_path / "run", store)).info.status == "FAILED"
    with open_tracker(tmp_path / "run", run_name="run", enabled=False, owns_status=False) as evaluation:
        evaluation.metrics(0, {"eval/demo/acc1": 0.5})
    report = sync(tmp_path / "run", store)
    assert (report.sent, mlflow_run(store, report).info.status) == (1, "FAILED")


def test_exception_and_interrupt_end_a_run_as_failed_and_killed(tmp_path: Path, store: str) -> None:
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        run_dir = tmp_path / status
        with pytest.raises(error), open_tracker(run_dir, run_name=status, enabled=False):
            raise error
        assert mlflow_run(store, sync(run_dir, store)).info.status == status


def test_a_deleted_run_comes_back_only_when_restored(journal_only: Make, store: str) -> None:
    """Deleted run is not made again and comes back when restored."""
    from mlflow import MlflowClient

    run_dir = journal_only()
    run_id = str(sync(run_dir, store).run_id)
    MlflowClient(store).delete_run(run_id)
    journal = Journal(run_dir)
    journal.metrics(50, {"loss": 0.1})
    journal.close()
    report = sync(run_dir, store)
    assert report.pending == 1
    assert f"mlflow runs restore --run-id {run_id}" in str(report.error)
    MlflowClient(store).restore_run(run_id)
    assert sync(run_dir, store).complete


def test_empty_twin_of_a_timed_out_creation_is_removed(journal_only: Make, store: str) -> None:
    from mlflow import MlflowClient

    run_dir = journal_only()
    report = sync(run_dir, store)
    client = MlflowClient(store)
    uuid = json.loads((run_dir / RUN_FILE).read_text())["tracking"]["run"]
    experiment = client.get_run(str(report.run_id)).info.experiment_id
    twin = client.create_run(experiment, tags={"selora.run": uuid}).info.run_id
    assert sync(run_dir, store).run_id == report.run_id
    assert client.get_run(twin).info.lifecycle_stage == "deleted"


def test_store_that_lost_the_run_gets_it_whole_again(
    journal_only: Make, store: str, store_dir: Path, metric_rows: Rows
) -> None:
    run_dir = journal_only()
    first = str(sync(run_dir, store).run_id)
    with sqlite3.connect(store_dir / "mlflow.db", timeout=20) as connection:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            connection.execute(f"delete from {table} where run_uuid = ?", (first,))
    report = sync(run_dir, store)
    assert report.complete
    assert report.run_id != first
    assert len(metric_rows(str(report.run_id))) == 10


def test_an_unwritable_position_costs_a_second_delivery(
    journal_only: Make, store: str, metric_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """Position that cannot be written only costs a second delivery."""
    run_dir = journal_only()
    report = sync(run_dir, store)
    (run_dir / STATE_FILE).unlink()
    (run_dir / STATE_FILE).mkdir()  # a directory cannot be replaced by a file
    again = sync(run_dir, store)
    assert (again.run_id, again.sent) == (report.run_id, report.sent)
    assert STATE_FILE in caplog.text
    assert len(metric_rows(str(report.run_id))) == 10


def test_runs_that_start_together_make_one_experiment(journal_only: Make, tmp_path: Path, python: Start) -> None:
    """Two runs that start together make one store and one experiment."""
    code = """
import sys
from pathlib import Path
from pipeline.tracking.mlflow.sync import sync
report = sync(Path(sys.argv[1]))
print(report, report.run_id)
sys.exit(0 if report.complete else 1)
"""
    both = [python(code, journal_only(name)) for name in ("one", "two")]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        experiments = connection.execute("select name, artifact_location from experiments where experiment_id != 0")
        assert experiments.fetchall() == [("selora", str(tmp_path / "mlartifacts"))]
        assert connection.execute("select count(*) from runs").fetchall() == [(2,)]


def test_null_tracker_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with NullTracker() as tracker:
        tracker.metrics(0, {"loss": 1.0})
        tracker.params({"a": 1})
        tracker.tags({"a": 1})
        tracker.artifact(tmp_path)
        tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_password_kept_nowhere_is_asked_for(tmp_path: Path) -> None:
    """A password that is not stored is an error, and no other store is used."""
    run_dir = tmp_path / "run"
    with open_tracker(run_dir, run_name="run", enabled=False):
        ensure_identity(run_dir, "run", "selora", "http://me:***@host", None)
    with pytest.raises(ConfigError, match=r"the password of http://me:\*\*\*@host is not stored; .* --uri"):
        sync(run_dir)
    assert not (tmp_path / "mlflow.db").exists()
