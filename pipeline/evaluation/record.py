"""Records the results of a run's model: first in the journal, then in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.evaluation.results import Result
from pipeline.evaluation.summary import Summary
from pipeline.runs.results import EVAL, FLOORS_FILE
from pipeline.selection.frontier import floors_of
from pipeline.selection.ranking import point_of
from pipeline.tracking.tracker import RunTracker, open_tracker


def track_results(run_dir: Path, config: Config, step: int, results: dict[str, Result], summary: Summary) -> None:
    """Add `eval/<dataset>/<metric>`, means and changes of the groups, the shares kept, and the result files, at `step`.

    Rank 0 only. A value recorded at a step cannot be changed, so the mean of a group waits until all of its datasets
    are evaluated, and the shares kept until all groups are.
    """
    values = {
        f"eval/{key}/{metric.replace('@', '_at_')}": value
        for key, result in results.items()
        for metric, value in result["metrics"].items()
        if value is not None
    }
    complete = {group for group, found in summary["groups"].items() if not found["missing"]}
    for group in complete:
        found = summary["groups"][group]
        values[f"eval/mean/{group}"] = found["mean"]
        if found["change"] is not None:
            values[f"eval/change/{group}"] = found["change"]
    if summary["forgetting"] is not None and complete == summary["groups"].keys():
        values["eval/forgetting"] = summary["forgetting"]
    if (point := point_of(summary)) is not None:
        values |= {"eval/kept": point.kept, "eval/kept_worst": point.worst_kept}
    with _tracker(run_dir, config) as tracker:
        tracker.metrics(step, values)
        for file in sorted((run_dir / "eval").glob("*.json")):
            tracker.artifact(file, "eval")


def track_curve(run_dir: Path, config: Config, file: Path, curve: Mapping[str, Any]) -> None:
    """Add a strength curve: the file, and `strength/<group>` and `strength/kept` with α in percent as the step.

    Rank 0 only.
    """
    with _tracker(run_dir, config) as tracker:
        for alpha, means in curve["groups"].items():
            values = {f"strength/{group}": mean for group, mean in means.items()}
            values |= {"strength/kept": curve["kept"][alpha]} if alpha in curve["kept"] else {}
            tracker.metrics(round(100 * float(alpha)), values)
        tracker.artifact(file, "eval")


def track_floors(run_dir: Path, config: Config, step: int, content: Mapping[str, Any]) -> None:
    """Add `eval/id_at_95`, `eval/strength_at_95` and `eval/kept_at_95` for each floor, and the result files.

    The tag `selora.objective` holds the value by which a sweep compares its trials. Rank 0 only.
    """
    values, tags = {}, {}
    for floor, each in floors_of(content).items():
        at = f"{100 * floor:g}"
        values |= {f"eval/id_at_{at}": each.id, f"eval/strength_at_{at}": each.alpha, f"eval/kept_at_{at}": each.kept}
        if floor == content["floor"]:
            tags["selora.objective"] = f"id {each.id:.4f} at kept >= {floor:g} (strength {each.alpha:g})"
    with _tracker(run_dir, config) as tracker:
        tracker.metrics(step, values)
        tracker.tags(tags)
        tracker.artifact(run_dir / EVAL / FLOORS_FILE, EVAL)


def track_strength(run_dir: Path, config: Config, name: str) -> None:
    """Add the results of the run's model at one strength, "0.5" or "auto". Rank 0 only."""
    with _tracker(run_dir, config) as tracker:
        for file in sorted((run_dir / "eval" / "strength" / name).glob("*.json")):
            tracker.artifact(file, f"eval/strength/{name}")


def _tracker(run_dir: Path, config: Config) -> RunTracker:
    return open_tracker(
        run_dir,
        run_name=config.name,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        enabled=config.tracking.enabled,
        owns_status=False,
    )
