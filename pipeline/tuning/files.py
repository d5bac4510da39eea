"""A sweep on disk: its trials and their progress, which any process can read while it runs.

OUT/NAME/sweep.json                    the trials, written once the grid is expanded
OUT/NAME/trials/<name>/                a run directory with an additional trial.json
OUT/NAME/baselines/<digest>/           results of the untouched model, shared by all trials
OUT/NAME/stop                          present while the sweep is asked to save and stop
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config, ConfigError, flatten
from pipeline.evaluation.results import write_json
from pipeline.tuning.grid import Grid, Trial

SWEEP_FILE, TRIAL_FILE, STOP_FILE, TRIALS = "sweep.json", "trial.json", "stop", "trials"
Status = Literal["waiting", "training", "evaluating", "finished", "failed", "stopped"]
OVER: tuple[Status, ...] = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class TrialState:
    """trial.json. `waiting` with a step above 0 was interrupted and will continue; `stopped` was ended by ASHA."""

    status: Status = "waiting"
    step: int = 0
    total_steps: int = 0
    error: str | None = None
    attempts: int = 0
    updated: str = ""


def trial_dir(sweep_dir: Path, name: str) -> Path:
    """Run directory of a trial."""
    return sweep_dir / TRIALS / name


def read_state(run_dir: Path) -> TrialState:
    """The state of a trial; a fresh one if nothing was written yet."""
    try:
        content = json.loads((run_dir / TRIAL_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return TrialState()
    return TrialState(**{name: content[name] for name in TrialState.__dataclass_fields__ if name in content})


def write_state(run_dir: Path, **changes: Any) -> TrialState:
    """Change some fields of trial.json, by one process at a time. If nothing changes, the file is not written."""
    before = read_state(run_dir)
    state = replace(before, **changes)
    if state == before:
        return before
    state = replace(state, updated=datetime.now(UTC).isoformat(timespec="seconds"))
    write_json(run_dir / TRIAL_FILE, asdict(state))
    return state


def steps_done(run_dir: Path) -> int:
    """Steps in the newest checkpoint; the file is read here because the checkpoint's own module needs torch."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        return 0
    state = json.loads(
        (pointer.parent / pointer.read_text(encoding="utf-8").strip() / "state.json").read_text(encoding="utf-8")
    )
    return int(state["step"])


def write_sweep(sweep_dir: Path, config: Config, grid: Grid, trials: Sequence[Trial], digest: str) -> None:
    """Write sweep.json, from which report and promotion read the trials."""
    content = {
        "format": "selora-sweep",
        "version": 1,
        "name": config.name,
        "digest": digest,
        "base_config": flatten(config),
        "grid": grid.source,
        "trials": [
            {"id": one.id, "name": one.name, "label": one.label, "changes": one.changes, "baseline": one.baseline}
            for one in trials
        ],
    }
    write_json(sweep_dir / SWEEP_FILE, content)


def read_sweep(sweep_dir: Path) -> dict[str, Any] | None:
    """The content of sweep.json; None if there is none, ConfigError if it is another kind of file."""
    path = sweep_dir / SWEEP_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != "selora-sweep" or content.get("version") != 1:
        raise ConfigError(f"{path}: not a sweep of this version of selora")
    return content
