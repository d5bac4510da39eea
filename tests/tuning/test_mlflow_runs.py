"""The sweep in MLflow, in a real SQLite store, without a trial having run."""

from __future__ import annotations

from sweep_by_hand import lay_out

from pipeline.runs.sweep import read_state, trial_dir, write_state
from pipeline.tuning.mlflow_runs import REASON_TAG, SweepRuns


def test_trials_in_mlflow_are_scheduled_or_failed(make_config, make_grid, tmp_path) -> None:
    """A trial that has not begun is scheduled and one that cannot is failed."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config("tracking.enabled=true", f"tracking.uri={store}", "tracking.machine_every_s=null")
    grid = make_grid("grid: {rank: [2, 4]}")
    trials = lay_out(config, grid)
    sweep_dir = tmp_path / "runs" / "sweep"
    write_state(trial_dir(sweep_dir, trials[1].name), status="failed", error="out of memory")
    with SweepRuns(sweep_dir, config, grid, trials) as record:
        states = {trial.name: read_state(trial_dir(sweep_dir, trial.name)) for trial in trials}
        record.close(states, "the table", complete=False)
    statuses, reasons = _children(store)
    assert statuses == {trials[0].name: "SCHEDULED", trials[1].name: "FAILED", "sweep": "KILLED"}
    assert reasons == {trials[1].name: "out of memory"}


def _children(store: str) -> tuple[dict[str, str], dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    statuses = {str(run.info.run_name): run.info.status for run in runs}
    return statuses, {str(r.info.run_name): r.data.tags[REASON_TAG] for r in runs if REASON_TAG in r.data.tags}
