"""The sweep in MLflow: a parent run, a child per trial, and the end of each child that could not record its own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pipeline.config import Config, flatten
from pipeline.files import replace_text
from pipeline.runs.sweep import OVER, SWEEP_FILE, TRIALS, TrialState, trial_dir
from pipeline.tracking.identity import ensure_identity, read_identity
from pipeline.tracking.journal import JOURNAL, Journal, lock_path
from pipeline.tracking.locks import is_held
from pipeline.tracking.mlflow.delivery import StoreState, load_state, pending
from pipeline.tracking.mlflow.sync import sync
from pipeline.tracking.mlflow.uris import PasswordMissing, resolve_uri
from pipeline.tracking.tracker import RunTracker, environment_tags, open_tracker
from pipeline.tuning.grid import Grid
from pipeline.tuning.trials import Trial

MACHINE_SECONDS = 15.0
TABLE_FILE = "table.txt"
STATUS_TAG, REASON_TAG, TRIAL_TAG = "selora.trial.status", "selora.trial.reason", "selora.trial"
_ENDS: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "stopped": "KILLED",
    "waiting": "KILLED",
}

logger = logging.getLogger("selora.tracking")


class SweepRuns:
    """The parent run while the sweep runs. Its journal is locked, which prevents a second command from running."""

    def __init__(self, sweep_dir: Path, config: Config, grid: Grid, trials: Sequence[Trial]) -> None:
        self._dir, self._config = sweep_dir, config
        tracking = self._tracking = trials[0].config.tracking if trials else config.tracking
        self._tracker: RunTracker = open_tracker(
            sweep_dir,
            run_name=config.name,
            uri=tracking.uri,
            experiment=tracking.experiment,
            enabled=tracking.enabled,
            extra_tags={"selora.kind": "sweep", **environment_tags()},
            system_metrics=(socket.gethostname(), MACHINE_SECONDS),
            below=sweep_dir / TRIALS,
        )
        self._tracker.params({**flatten(config), "grid": grid.source})
        self.place(trials)

    def close(self, states: Mapping[str, TrialState], table: str, *, complete: bool) -> None:
        """Record the ends in the parent, and close every child with its trial's status and reason."""
        over = sum(one.status in OVER for one in states.values())
        ends = {f"trials/{end}": float(sum(one.status == end for one in states.values())) for end in _ENDS}
        self._tracker.metrics(over, ends)
        replace_text(self._dir / TABLE_FILE, table + "\n")
        for name in (SWEEP_FILE, TABLE_FILE):
            self._tracker.artifact(self._dir / name)
        for name, state in states.items():
            _write_end(trial_dir(self._dir, name), state)
        self._tracker.finish("FINISHED" if complete else "KILLED")
        self._deliver([trial_dir(self._dir, name) for name in states])

    def place(self, trials: Sequence[Trial]) -> None:
        """Record the parent run in each trial's directory before it trains."""
        above = read_identity(self._dir)
        assert above is not None, "written by the parent's tracker"
        for trial in trials:
            run_dir = trial_dir(self._dir, trial.name)
            run_dir.mkdir(parents=True, exist_ok=True)
            if read_identity(run_dir) is not None:
                continue
            ensure_identity(run_dir, trial.name, above.experiment, above.uri, above.run)
            tags = {TRIAL_TAG: trial.id, "selora.label": trial.label, "selora.sweep": self._config.name}
            journal = Journal(run_dir)
            journal.write("tags", values=tags)
            journal.write("status", status="SCHEDULED")
            journal.close()

    def _deliver(self, run_dirs: Sequence[Path]) -> None:
        """Deliver what the shipper could not deliver, as long as the store answers."""
        tracking = self._tracking
        if not tracking.enabled:
            return
        try:
            uri = resolve_uri(tracking.uri, self._dir.parent)
        except PasswordMissing:
            return  # already reported by the tracker
        for run_dir in run_dirs:
            if not (run_dir / JOURNAL).is_file() or _delivered(run_dir, uri):
                continue
            report = sync(run_dir, uri)
            if report.error is not None:
                logger.warning("tracking: %s; `selora track sync %s` catches up", report.error, self._dir)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._tracker.finish("FAILED" if kind is not None and issubclass(kind, Exception) else "KILLED")


def _write_end(run_dir: Path, state: TrialState) -> None:
    """Write the end of a trial to its run's journal, if the run did not do so itself."""
    if not (run_dir / JOURNAL).is_file() or is_held(lock_path(run_dir / JOURNAL)):
        return
    journal = Journal(run_dir)
    try:
        if state.status == "waiting" and journal.status != "RUNNING":
            return
        tags = {STATUS_TAG: state.status}
        if state.error or state.attempts > 1:  # also to clear the reason of an earlier attempt
            tags[REASON_TAG] = state.error or "none"
        journal.write("tags", values=tags)
        if journal.status != _ENDS[state.status]:
            journal.write("status", status=_ENDS[state.status])
    finally:
        journal.close()


def _delivered(run_dir: Path, uri: str) -> bool:
    state = load_state(run_dir, uri)
    return state.parent_linked and state.error is None and not pending(run_dir, state) and not _owes_status(state)


def _owes_status(state: StoreState) -> bool:
    return state.status is not None and state.status[0] != state.status_sent
