"""A sweep on disk: what each trial is and how far it has come, readable by everybody while it runs.

OUT/NAME/sweep.json                    the trials, written once the grid is expanded
OUT/NAME/trials/<name>/                a run directory, and trial.json beside its files
OUT/NAME/baselines/<digest>/           results of the untouched model, shared by all trials
OUT/NAME/stop                          there while the sweep is asked to save and end
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
    """trial.json. `waiting` with a step above 0 was cut and goes on; `stopped` lost against others for good."""

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
    """How far a trial has come; a fresh state before anything was written."""
    try:
        content = json.loads((run_dir / TRIAL_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return TrialState()
    return TrialState(**{name: content[name] for name in TrialState.__dataclass_fields__ if name in content})


def write_state(run_dir: Path, **changes: Any) -> TrialState:
    """Change some fields of trial.json; one process at a time has the right to. Without a change it stays as it is."""
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
    """sweep.json, from which report and promotion know the trials."""
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
    """What sweep.json holds, None before the first; ConfigError when it is something else."""
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
