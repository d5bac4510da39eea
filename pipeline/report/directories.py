"""Runs read from disk: one run directory, a sweep, or a directory of runs. Works while they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, flatten, load_config
from pipeline.evaluation.summary import Summary
from pipeline.files import read_json
from pipeline.report.records import Best, Collection, Flat, Run, RunSettings, Series, Status
from pipeline.runs.blocks import read_budget
from pipeline.runs.results import (
    CHECKPOINTS_FILE,
    EVAL,
    STRENGTH_FILE,
    has_summary,
    read_floors,
    read_summary,
    reported_at,
)
from pipeline.runs.run import CONFIG_FILE, acting_parameters, is_run, read_gates
from pipeline.runs.sweep import (
    BASELINES,
    SWEEP_FILE,
    TRIAL_FILE,
    TrialState,
    is_sweep,
    read_state,
    read_sweep,
    trial_dir,
)
from pipeline.selection.frontier import AtStrength, floors_of
from pipeline.selection.standings import configuration_of
from pipeline.tracking.journal import JOURNAL, Record, decode, lock_path, read
from pipeline.tracking.locks import is_held


def collect(directory: Path) -> Collection:
    """All runs of a directory; ConfigError unless it is a run, a sweep, or contains runs."""
    if is_sweep(directory):
        return _sweep(directory)
    if is_run(directory):
        return Collection(directory.name, str(directory), [_run(directory)])
    runs = [_run(path.parent) for path in sorted(directory.glob(f"*/{CONFIG_FILE}"))] if directory.is_dir() else []
    if not runs:
        raise ConfigError(
            f"{directory}: neither a run (config.yaml) nor a sweep ({SWEEP_FILE}), and no runs in it; "
            f"for an MLflow experiment write mlflow:NAME"
        )
    return Collection(directory.name, str(directory), runs)


def _sweep(directory: Path) -> Collection:
    content = read_sweep(directory)
    runs = [_trial(directory, entry, content) for entry in content["trials"]]
    attended = is_held(lock_path(directory / JOURNAL))
    return Collection(content["name"], str(directory), runs, attended, content.get("floor"))


def _trial(directory: Path, entry: Mapping[str, Any], sweep: Mapping[str, Any]) -> Run:
    """A trial, even one that has not started or died before it wrote anything; its settings are in sweep.json."""
    folder = trial_dir(directory, entry["name"])
    config = {**sweep["base_config"], **entry["changes"], **({"soup": True} if entry.get("soup_of") else {})}
    state = read_state(folder) if (folder / TRIAL_FILE).is_file() else None
    common = {"label": entry["label"], "baseline": entry["baseline"], "baselines": directory / BASELINES}
    common |= {"configuration": configuration_of(entry), "floor": sweep.get("floor")}
    if is_run(folder):
        return _run(folder, state=state, config=config, **common)
    state = state or TrialState()
    return Run(entry["name"], entry["label"], config, state.status, entry["baseline"], state.error)


def _run(
    directory: Path,
    *,
    label: str | None = None,
    baseline: bool = False,
    state: TrialState | None = None,
    config: Flat | None = None,
    baselines: Path | None = None,
    configuration: str | None = None,
    floor: float | None = None,
) -> Run:
    config = flatten(load_config(directory / CONFIG_FILE)) if config is None else config
    results, best, floors = directory / EVAL, _best(directory / EVAL), floors_of(read_floors(directory / EVAL))
    summary = _summary(results)
    if summary is None and best is not None:
        results, summary = results / "checkpoints" / str(best.step), best.summary
    step = best.step if best is not None and summary is best.summary else None
    journal = _Journal(directory)
    return Run(
        name=directory.name,
        label=label or _label(directory.name, RunSettings.of(config)),
        config=config,
        status=state.status if state else _status(directory, journal.status, summary),
        baseline=baseline,
        error=state.error if state else None,
        step=journal.last_step or (state.step if state else 0),
        total_steps=(state.total_steps if state else None) or _planned(config),
        summary=summary,
        metrics=_metrics(results, summary),
        untouched=_untouched(baselines or directory.absolute().parent / BASELINES, summary),
        gates=read_gates(directory, step),
        history=journal.history,
        strength=_json(directory / EVAL / STRENGTH_FILE) if (directory / EVAL / STRENGTH_FILE).is_file() else None,
        best=best,
        configuration=configuration,
        floors=floors,
        at_floor=None if floor is None else _at_floor(directory, floors.get(floor)),
        cost=acting_parameters(directory),
        budget=read_budget(directory) if step is None else None,
    )


def _at_floor(directory: Path, at: AtStrength | None) -> Summary | None:
    """The results of a trial at the strength that keeps a floor; None if it was not evaluated, and at strength 0."""
    return None if at is None or at.alpha == 0 else _summary(directory / reported_at(at.alpha))


def _planned(config: Flat) -> int | None:
    """train.steps; without its shards, the number of steps of a run by epochs is unknown."""
    return config.get("train.steps")


def _label(name: str, settings: RunSettings) -> str:
    parts = [settings.method]
    parts += [f"r{settings.rank}"] if settings.rank is not None else []
    parts += [f"λ{settings.lam:g}"] if settings.lam is not None else []
    return f"{name} ({' '.join(parts)})"


def _status(directory: Path, status: str | None, summary: Summary | None) -> Status:
    """Status by the last entry of the journal. A run that is RUNNING there but not held by a process was killed."""
    if status == "RUNNING":
        return "training" if is_held(lock_path(directory / JOURNAL)) else "stopped"
    if status == "FAILED":
        return "failed"
    if status == "KILLED":
        return "stopped"
    return "finished" if summary is not None else "trained"


class _Journal:
    """Status, steps and histories of a run, from its own journal."""

    def __init__(self, directory: Path) -> None:
        self.status: str | None = None
        self.history: dict[str, Series] = {}
        path = directory / JOURNAL
        for record in read(path) if path.is_file() else ():
            if isinstance(record, Record):
                self._take(record)

    def _take(self, record: Record) -> None:
        if record.kind == "status":
            self.status = record.data["status"]
        elif record.kind == "metrics":
            for key, value in record.data["values"].items():
                self.history.setdefault(key, []).append((record.data["step"], decode(value)))

    @property
    def last_step(self) -> int:
        return max((series[-1][0] for key, series in self.history.items() if key.startswith("train/")), default=0)


def _summary(folder: Path) -> Summary | None:
    return read_summary(folder) if has_summary(folder) else None


def _best(folder: Path) -> Best | None:
    """The result of `selora evaluate --checkpoints`; None without it, or until the best checkpoint has results."""
    if not (folder / CHECKPOINTS_FILE).is_file():
        return None
    content = _json(folder / CHECKPOINTS_FILE)
    lines = {line["step"]: line for line in content["checkpoints"]}
    best, last = lines[content["best"]], lines[content["last"]]
    summary = _summary(folder / "checkpoints" / str(best["step"]))
    if summary is None:
        return None
    share = best["active_blocks"] / best["blocks"] if best["blocks"] else None
    return Best(best["step"], best["id"], last["step"], last["id"], share, summary)


def _metrics(folder: Path, summary: Summary | None) -> dict[str, dict[str, float]]:
    """All metrics of the datasets in a summary whose result files exist."""
    keys = [] if summary is None else summary["datasets"]
    files = {key: folder / f"{key}.json" for key in keys}
    return {key: _json(file)["metrics"] for key, file in files.items() if file.is_file()}


def _untouched(baselines: Path, summary: Summary | None) -> dict[str, dict[str, float]]:
    if summary is None:
        return {}
    return _metrics(baselines / str(summary.get("base_digest", ""))[:16], summary)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from None
