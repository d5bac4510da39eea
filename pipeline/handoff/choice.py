"""Which run is meant by a directory: the run itself, or the chosen trial of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.evaluation.choice import choose, point_of
from pipeline.evaluation.summary import SUMMARY_FILE, read_summary
from pipeline.model.restore import is_run

SWEEP_FILE = "sweep.json"


def chosen_run(target: Path) -> tuple[Path, str]:
    """(run directory, how it was chosen or "") of a run or a sweep; ConfigError for any other directory."""
    if (target / SWEEP_FILE).is_file():
        return _chosen_trial(target)
    if is_run(target):
        return target, ""
    raise ConfigError(f"{target} is neither a run (no config.yaml) nor a sweep (no {SWEEP_FILE})")


def _chosen_trial(sweep: Path) -> tuple[Path, str]:
    """By the rule that the report marks its chosen model by, among the trials that are evaluated."""
    try:
        names = [trial["name"] for trial in json.loads((sweep / SWEEP_FILE).read_text(encoding="utf-8"))["trials"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{sweep / SWEEP_FILE}: cannot be read: {type(error).__name__} {error}") from error
    points = {}
    for name in names:
        folder = sweep / "trials" / name / "eval"
        if (folder / SUMMARY_FILE).is_file() and (point := point_of(read_summary(folder))) is not None:
            points[name] = point
    if not points:
        raise ConfigError(f"{sweep}: none of its {len(names)} trials has results of all groups yet")
    name = choose(points)
    told = f"chosen of {len(points)} trials: {name} (id {points[name].id:.4f}, kept {points[name].kept:.4f})"
    left = len(names) - len(points)
    return sweep / "trials" / name, told + (f"; {left} without results" if left else "")
