"""Runs read back from an MLflow experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, flatten
from pipeline.evaluation.summary import Summary
from pipeline.report.records import Collection, Run, RunSettings, Status, scalar
from pipeline.runs.results import EVAL, STRENGTH_FILE, SUMMARY, SUMMARY_FILE
from pipeline.runs.run import GATES_FILE, open_gates
from pipeline.tracking.mlflow.reader import StoredRun, read_experiment

# The tag in which a sweep records the status of a trial, in addition to MLflow's own.
LABEL_TAG, REASON_TAG = "selora.label", "selora.trial.reason"
# Metrics that figures draw over time; scores of single gates are only in reports of run directories.
HISTORIES = ("train/loss", "adapter/active_share", "adapter/active_blocks")
_SUMMARY, _STRENGTH, _GATES = f"{EVAL}/{SUMMARY_FILE}", f"{EVAL}/{STRENGTH_FILE}", GATES_FILE


def collect(experiment: str, uri: str | None) -> Collection:
    """The trainings of an experiment; ConfigError when it has none."""
    stored = read_experiment(experiment, uri, histories=HISTORIES, files=(_SUMMARY, _STRENGTH, _GATES))
    runs = [one for one in stored if "adapter.kind" in one.params]
    if not runs:
        raise ConfigError(f"the experiment {experiment!r} has no training among its {len(stored)} runs")
    names = _names(runs, {one.run_id: one.name for one in stored})
    return Collection(experiment, f"MLflow experiment {experiment}", [_run(one, names[one.run_id]) for one in runs])


def _names(runs: list[StoredRun], all_names: Mapping[str, str]) -> dict[str, str]:
    """A run's name; where several runs share it, with the name of the sweep and, if needed, a part of its id."""
    names = {one.run_id: one.name for one in runs}
    for suffix in (lambda one: all_names.get(one.parent or "", ""), lambda one: one.run_id[:6]):
        counts = list(names.values())
        for one in runs:
            more = suffix(one)
            if counts.count(names[one.run_id]) > 1 and more:
                names[one.run_id] += f" · {more}"
    return names


def _run(one: StoredRun, name: str) -> Run:
    # A run of an earlier version lacks the options that came later.
    config = _defaults() | {key: scalar(value) for key, value in one.params.items()}
    summary: Summary | None = (
        SUMMARY.parse(one.files[_SUMMARY], f"{one.name}: {_SUMMARY}") if _SUMMARY in one.files else None
    )
    settings = RunSettings.of(config)
    steps = [step for series in one.histories.values() for step, _ in series]
    return Run(
        name=name,
        label=one.tags.get(LABEL_TAG, name),
        config=config,
        status=_status(one.status, summary),
        baseline=False,
        error=one.tags.get(REASON_TAG),
        step=max(steps, default=0),
        total_steps=config.get("train.steps"),
        summary=summary,
        metrics=_metrics(one.metrics, summary),
        gates=_gates(one, settings, float(config["gate.threshold"])),
        history=one.histories,
        strength=json.loads(one.files[_STRENGTH]) if _STRENGTH in one.files else None,
    )


def _defaults() -> dict[str, Any]:
    return flatten(Config.model_validate({"data": {"train": "unset"}}))


def _status(status: str, summary: Summary | None) -> Status:
    known: dict[str, Status] = {"RUNNING": "training", "SCHEDULED": "waiting", "FAILED": "failed", "KILLED": "stopped"}
    return known.get(status) or ("finished" if summary is not None else "trained")


def _metrics(values: Mapping[str, float], summary: Summary | None) -> dict[str, dict[str, float]]:
    """Metrics named eval/<dataset>/<metric>, under the names of the result files."""
    found: dict[str, dict[str, float]] = {}
    for key in {} if summary is None else summary["datasets"]:
        prefix = f"eval/{key}/"
        found[key] = {
            name.removeprefix(prefix).replace("_at_", "@"): value
            for name, value in values.items()
            if name.startswith(prefix)
        }
    return found


def _gates(one: StoredRun, settings: RunSettings, threshold: float) -> dict[str, bool]:
    """Open blocks, from the file if the store has it, else from the last recorded scores."""
    if _GATES in one.files:
        return open_gates(json.loads(one.files[_GATES]))
    if not settings.gated:
        return {}
    scores = {name.removeprefix("gate/"): value for name, value in one.metrics.items() if name.startswith("gate/")}
    return {target: score >= threshold for target, score in scores.items()}


def default_folder(experiment: str) -> Path:
    """The default directory for the report of an experiment."""
    return Path("report") / "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in experiment)
