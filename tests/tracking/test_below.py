"""One process of a sweep also ships its trials: their values, ends and places, whichever of them dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking.identity import ensure_identity, read_identity
from pipeline.tracking.journal import JOURNAL
from pipeline.tracking.locks import is_held
from pipeline.tracking.mlflow.delivery import SHIPPING_LOCK, load_state
from pipeline.tracking.mlflow.shipper import LOG_FILE
from pipeline.tracking.tracker import SHIPPED_VARIABLE, open_tracker

Rows = Callable[[str], list[tuple[str, int, float, int]]]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def place(parent: Path, name: str, store: str) -> Path:
    """A trial's directory as a sweep lays it out: whose child it is, and nothing yet."""
    above = read_identity(parent)
    assert above is not None
    child = parent / "trials" / name
    child.mkdir(parents=True)
    ensure_identity(child, name, above.experiment, store, above.run)
    return child


def shipped(run_dir: Path, store: str) -> bool:
    return load_state(run_dir, store).offsets.get(JOURNAL, 0) == (run_dir / JOURNAL).stat().st_size


def losses(metric_rows: Rows, run_id: str | None) -> list[int]:
    return [step for key, step, _, _ in metric_rows(str(run_id)) if key == "loss"]


@pytest.mark.timeout(600)
def test_a_refused_run_does_not_hold_up_the_trials(
    tmp_path: Path, store: str, metric_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials are shipped and a run that the store refuses holds up nothing."""
    parent = tmp_path / "sweep"
    tracker = open_tracker(parent, run_name="sweep", uri=store, below=parent / "trials")
    monkeypatch.setenv(SHIPPED_VARIABLE, "1")
    runs = {name: place(parent, name, store) for name in ("a", "b", "c")}
    trials = {name: open_tracker(run_dir, run_name=name, uri=store) for name, run_dir in runs.items()}
    for step in range(20):
        trials["a"].metrics(step, {"loss": 1.0})
        trials["b"].metrics(step, {"loss": 2.0})
    wait_for(lambda: all(shipped(run_dir, store) for run_dir in runs.values()), "all trials in the store")
    ids = {name: load_state(run_dir, store).run_id for name, run_dir in runs.items()}
    client = MlflowClient(store)
    client.delete_run(str(ids["a"]))
    for name in ("a", "b"):
        trials[name].metrics(20, {"loss": 3.0})
        trials[name].finish("FINISHED")
    wait_for(lambda: shipped(runs["b"], store), "the rest of b in spite of a")
    client.restore_run(str(ids["a"]))
    trials["c"].finish("FAILED")
    tracker.finish()
    assert not any((run_dir / LOG_FILE).exists() for run_dir in runs.values())  # no process of their own
    found = {name: client.get_run(str(run_id)) for name, run_id in ids.items()}
    assert {name: run.info.status for name, run in found.items()} == {"a": "FINISHED", "b": "FINISHED", "c": "FAILED"}
    above = load_state(parent, store).run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {above}
    assert losses(metric_rows, ids["a"]) == losses(metric_rows, ids["b"]) == list(range(21))


SWEEP = """
import sys, time
from pathlib import Path
from pipeline.tracking.tracker import open_tracker
run_dir = Path(sys.argv[1])
open_tracker(run_dir, run_name="sweep", uri=sys.argv[2], below=run_dir / "trials")
print("open", flush=True)
time.sleep(900)
"""
TRIAL = """
import sys, time
from pathlib import Path
from pipeline.tracking.tracker import open_tracker
tracker = open_tracker(Path(sys.argv[1]), run_name="trial", uri=sys.argv[2])
for step in range(1000):
    tracker.metrics(step, {"loss": 1.0})
    time.sleep(0.02)
"""


@pytest.mark.timeout(600)
def test_a_killed_sweep_and_trial_lose_no_value(
    tmp_path: Path, store: str, metric_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed sweep and then its trial leave every value and no open run."""
    parent = tmp_path / "sweep"
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP, str(parent), store], stdout=subprocess.PIPE)
    assert sweep.stdout is not None
    sweep.stdout.readline()
    monkeypatch.setenv(SHIPPED_VARIABLE, "1")
    child = place(parent, "trial", store)
    trial = subprocess.Popen([sys.executable, "-c", TRIAL, str(child), store])
    try:
        wait_for(lambda: load_state(child, store).offsets.get(JOURNAL, 0) > 0, "the first values")
        sweep.kill()
        time.sleep(3.0)  # as a cluster takes to end what belonged to the sweep
    finally:
        for process in (sweep, trial):
            process.kill()
            process.wait()
        sweep.stdout.close()
    wait_for(lambda: not is_held(parent / SHIPPING_LOCK), "the end of the shipment")
    client = MlflowClient(store)
    assert client.get_run(str(load_state(parent, store).run_id)).info.status == "KILLED"
    run_id = load_state(child, store).run_id
    assert client.get_run(str(run_id)).info.status == "KILLED"
    written = (child / JOURNAL).read_text().count('"loss"')
    assert losses(metric_rows, run_id) == list(range(written))
