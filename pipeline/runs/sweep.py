"""A sweep on disk: its trials and their progress, which any process can read while it runs.

OUT/NAME/sweep.json                    the trials, written once the grid is expanded
OUT/NAME/trials/<name>/                a run directory with an additional trial.json
OUT/NAME/trials/<name>_soup/           the mean of several seeds; its soup.json names their trials
OUT/NAME/baselines/<digest>/           results of the untouched model, shared by all trials
OUT/NAME/stop                          present while the sweep is to save and stop
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config, ConfigError, flatten
from pipeline.runs.formats import Format

SWEEP_FILE, TRIAL_FILE, STOP_FILE, TRIALS, BASELINES = "sweep.json", "trial.json", "stop", "trials", "baselines"
SOUP_FILE, ALARM_FILE = "soup.json", "alarm.json"
SWEEP = Format("selora-sweep", 1, ("name", "base_config", "trials"))
TRIAL = Format("selora-trial", 1, ("status",))
SOUP = Format("selora-soup", 1, ("of",))
ALARM = Format("selora-alarm", 1, ("step", "drift", "limit"))
Status = Literal["waiting", "training", "evaluating", "finished", "failed", "stopped"]
OVER: tuple[Status, ...] = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class TrialState:
    """trial.json. `waiting` with a step above 0: interrupted, continues; `stopped`: worse than others, or drifted."""

    status: Status = "waiting"
    step: int = 0
    total_steps: int = 0
    error: str | None = None
    attempts: int = 0
    updated: str = ""


def is_sweep(directory: str | Path) -> bool:
    """Whether this is a sweep directory."""
    return (Path(directory) / SWEEP_FILE).is_file()


def trial_dir(sweep_dir: Path, name: str) -> Path:
    """Run directory of a trial."""
    return sweep_dir / TRIALS / name


def read_state(run_dir: Path) -> TrialState:
    """The state of a trial; a new one if nothing has been written yet."""
    try:
        content = TRIAL.read(run_dir / TRIAL_FILE)
    except FileNotFoundError:
        return TrialState()
    return TrialState(**{name: content[name] for name in TrialState.__dataclass_fields__ if name in content})


def write_state(run_dir: Path, **changes: Any) -> TrialState:
    """Change some fields of trial.json, one process at a time. If nothing changes, the file is not written."""
    before = read_state(run_dir)
    state = replace(before, **changes)
    if state == before:
        return before
    state = replace(state, updated=datetime.now(UTC).isoformat(timespec="seconds"))
    TRIAL.write(run_dir / TRIAL_FILE, asdict(state))
    return state


def write_sweep(
    sweep_dir: Path,
    config: Config,
    grid: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    floor: float | None = None,
    max_drift: float | None = None,
) -> None:
    """Write sweep.json, from which report and promotion read the trials.

    Args:
        config: the config from which all trials start.
        grid: the grid file as written, {key: value}.
        trials: id, name, label, changes ({option: value}) and baseline of each; also `configuration`, equal for trials
            that differ by their seed alone, and for a soup `soup_of`, the names of its trials.
        floor: share kept at which trials are compared; None: at full strength.
        max_drift: drift at which a trial is stopped; None: never.
    """
    content = {"name": config.name, "base_config": flatten(config), "grid": dict(grid), "trials": list(trials)}
    limits = {"floor": floor, "max_drift": max_drift}
    SWEEP.write(sweep_dir / SWEEP_FILE, content | {key: value for key, value in limits.items() if value is not None})


def read_sweep(sweep_dir: Path) -> dict[str, Any]:
    """The content of sweep.json.

    Raises:
        FileNotFoundError: sweep.json has not been written yet.
        ConfigError: the file is damaged, of another kind or of a later version.
    """
    path = sweep_dir / SWEEP_FILE
    content = SWEEP.read(path)
    wanted = {"id", "name", "label", "changes", "baseline"}
    for trial in content["trials"] if isinstance(content["trials"], list) else [None]:
        if not isinstance(trial, dict) or not wanted <= trial.keys():
            raise ConfigError(f"{path}: each of its trials should have {', '.join(sorted(wanted))}")
    return content


def trial_dirs(sweep_dir: Path) -> list[Path]:
    """Run directories of a sweep's trials, in the order of its grid; they need not exist yet."""
    return [trial_dir(sweep_dir, trial["name"]) for trial in read_sweep(sweep_dir)["trials"]]


def floor_of(sweep_dir: Path) -> float | None:
    """Share kept at which the trials of a sweep are compared; None: at full strength."""
    return read_sweep(sweep_dir).get("floor")


def max_drift_of(sweep_dir: Path) -> float | None:
    """Drift at which a trial of a sweep is stopped; None: never."""
    return read_sweep(sweep_dir).get("max_drift")


@dataclass(frozen=True)
class Soup:
    """soup.json of a trial that is the mean of others: the trials that it should average, and those that it does."""

    of: list[str]
    made_of: list[str]


def read_soup(run_dir: Path) -> Soup | None:
    """The content of soup.json; None for a trial that trains."""
    try:
        content = SOUP.read(run_dir / SOUP_FILE)
    except FileNotFoundError:
        return None
    return Soup(list(content["of"]), list(content.get("made_of", [])))


def write_soup(run_dir: Path, of: Sequence[str], made_of: Sequence[str] = ()) -> None:
    """Write which trials a soup averages."""
    SOUP.write(run_dir / SOUP_FILE, {"of": list(of), "made_of": list(made_of)})


def finished_of(sweep_dir: Path, names: Sequence[str]) -> list[str]:
    """The finished ones among these trials, in their order."""
    return [name for name in names if read_state(trial_dir(sweep_dir, name)).status == "finished"]


def read_alarm(run_dir: Path) -> dict[str, Any] | None:
    """Step, drift and limit at which a trial was stopped; None if it was not."""
    try:
        return ALARM.read(run_dir / ALARM_FILE)
    except FileNotFoundError:
        return None


def write_alarm(run_dir: Path, step: int, drift: float, limit: float) -> None:
    """Record that a trial drifted too far."""
    ALARM.write(run_dir / ALARM_FILE, {"step": step, "drift": drift, "limit": limit})
