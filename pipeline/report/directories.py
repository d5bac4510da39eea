"""Runs read from disk: one run directory, a sweep, or a directory of runs. Works while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, flatten, load_config
from pipeline.evaluation.summary import SUMMARY_FILE, Summary, read_summary
from pipeline.report.records import Best, Collection, Flat, Run, Series, Settings, Status
from pipeline.tracking.journal import JOURNAL, Record, decode, lock_path, read
from pipeline.tracking.locks import is_held

SWEEP_FILE, TRIAL_FILE, STRENGTH_FILE = "sweep.json", "trial.json", "strength.json"
CHECKPOINTS_FILE = "checkpoints.json"
_BASELINES = "baselines"


def collect(directory: Path) -> Collection:
    """All runs of a directory; ConfigError unless it is a run, a sweep, or contains runs."""
    if (directory / SWEEP_FILE).is_file():
        return _sweep(directory)
    if (directory / "config.yaml").is_file():
        return Collection(directory.name, str(directory), [_run(directory)])
    runs = [_run(path.parent) for path in sorted(directory.glob("*/config.yaml"))] if directory.is_dir() else []
    if not runs:
        raise ConfigError(
            f"{directory}: neither a run (config.yaml) nor a sweep ({SWEEP_FILE}), and no runs in it; "
            f"for an MLflow experiment write mlflow:NAME"
        )
    return Collection(directory.name, str(directory), runs)


def _sweep(directory: Path) -> Collection:
    content = _json(directory / SWEEP_FILE)
    try:
        runs = [_trial(directory, entry, content["base_config"]) for entry in content["trials"]]
        return Collection(content["name"], str(directory), runs, is_held(lock_path(directory / JOURNAL)))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{directory / SWEEP_FILE}: not a file that a sweep has written: {error!r}") from error


def _trial(directory: Path, entry: Mapping[str, Any], base: Flat) -> Run:
    """A trial, also one that has not started, or died before it wrote anything; its settings are in sweep.json."""
    folder = directory / "trials" / entry["name"]
    config = {**base, **entry["changes"]}
    state = _json(folder / TRIAL_FILE) if (folder / TRIAL_FILE).is_file() else {}
    common = {"label": entry["label"], "baseline": entry["baseline"], "baselines": directory / _BASELINES}
    if (folder / "config.yaml").is_file():
        return _run(folder, state=state, config=config, **common)
    status: Status = state.get("status", "waiting")
    return Run(entry["name"], entry["label"], config, status, entry["baseline"], state.get("error"))


def _run(
    directory: Path,
    *,
    label: str | None = None,
    baseline: bool = False,
    state: Mapping[str, Any] | None = None,
    config: Flat | None = None,
    baselines: Path | None = None,
) -> Run:
    config = flatten(load_config(directory / "config.yaml")) if config is None else config
    results, best = directory / "eval", _best(directory / "eval")
    summary = _summary(results)
    if summary is None and best is not None:
        results, summary = results / "checkpoints" / str(best.step), best.summary
    step = best.step if best is not None and summary is best.summary else None
    journal = _Journal(directory)
    state = state or {}
    return Run(
        name=directory.name,
        label=label or _label(directory.name, Settings.of(config)),
        config=config,
        status=state.get("status") or _status(directory, journal.status, summary),
        baseline=baseline,
        error=state.get("error"),
        step=journal.last_step or int(state.get("step") or 0),
        total_steps=state.get("total_steps") or _planned(config),
        summary=summary,
        metrics=_metrics(results, summary),
        untouched=_untouched(baselines or directory.absolute().parent / _BASELINES, summary),
        gates=_gates(directory, step),
        history=journal.history,
        strength=_json(directory / "eval" / STRENGTH_FILE) if (directory / "eval" / STRENGTH_FILE).is_file() else None,
        best=best,
    )


def _planned(config: Flat) -> int | None:
    """train.steps; without its shards, the number of steps of a run by epochs is unknown."""
    return config.get("train.steps")


def _label(name: str, settings: Settings) -> str:
    parts = [settings.method]
    parts += [f"r{settings.rank}"] if settings.rank is not None else []
    parts += [f"λ{settings.lam:g}"] if settings.lam is not None else []
    return f"{name} ({' '.join(parts)})"


def _status(directory: Path, said: str | None, summary: Summary | None) -> Status:
    """Status by the last entry of the journal. A run that is RUNNING there but not held by a process was killed."""
    if said == "RUNNING":
        return "training" if is_held(lock_path(directory / JOURNAL)) else "stopped"
    if said == "FAILED":
        return "failed"
    if said == "KILLED":
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
    return read_summary(folder) if (folder / SUMMARY_FILE).is_file() else None


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


def _gates(directory: Path, step: int | None) -> dict[str, bool]:
    """Open blocks, from gate_map.json of a finished training, else from the newest checkpoint, which is of `step`."""
    own = [] if step is None else [directory / "checkpoints" / f"step-{step:08d}" / "state.json"]
    files = [*own, directory / "gate_map.json", *_checkpoints(directory)]
    for file in files:
        if file.is_file():
            content = _json(file)
            return {target: bool(gate["open"]) for target, gate in content.get("gate_map", content).items()}
    return {}


def _checkpoints(directory: Path) -> Iterator[Path]:
    pointer = directory / "checkpoints" / "latest"
    if pointer.is_file():
        yield pointer.parent / pointer.read_text(encoding="utf-8").strip() / "state.json"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object, found {type(content).__name__}")
    return content
