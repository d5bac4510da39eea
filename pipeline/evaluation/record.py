"""The results of a run's model in the run's own record: journal first, MLflow second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config
from pipeline.evaluation.results import Result
from pipeline.evaluation.summary import Summary
from pipeline.selection.ranking import point_of
from pipeline.tracking.tracker import RunTracker, open_tracker


def track_results(run_dir: Path, config: Config, step: int, results: dict[str, Result], summary: Summary) -> None:
    """Add `eval/<dataset>/<metric>`, means and changes of the groups, what was kept, and the result files, at `step`.

    Rank 0 only. A value recorded at a step stays, so the mean of a group waits until all of its datasets are evaluated,
    and what was kept until all of all groups are.
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


def track_curve(run_dir: Path, config: Config, file: Path, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Add a strength curve: the file, and `strength/<group>` with the step counting percents of α. Rank 0 only."""
    with _tracker(run_dir, config) as tracker:
        for alpha, means in groups.items():
            tracker.metrics(round(100 * float(alpha)), {f"strength/{group}": mean for group, mean in means.items()})
        tracker.artifact(file, "eval")


def _tracker(run_dir: Path, config: Config) -> RunTracker:
    return open_tracker(
        run_dir,
        run_name=config.name,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        enabled=config.tracking.enabled,
        owns_status=False,
    )
