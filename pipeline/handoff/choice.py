"""Which run is meant by a directory: the run itself, or the chosen trial of a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError, Promote, load_config
from pipeline.evaluation.summary import SUMMARY_FILE, read_summary
from pipeline.model.restore import is_run
from pipeline.selection.ranking import choose, point_of
from pipeline.selection.rule import holds

SWEEP_FILE = "sweep.json"


def chosen_run(target: Path, rule: Promote | None = None) -> tuple[Path, str]:
    """(run directory, how it was chosen or "") of a run or a sweep; ConfigError for any other directory.

    rule: what a trial should hold to be chosen (default: the rule in its config).
    """
    if (target / SWEEP_FILE).is_file():
        return _chosen_trial(target, rule)
    if is_run(target):
        return target, ""
    raise ConfigError(f"{target} is neither a run (no config.yaml) nor a sweep (no {SWEEP_FILE})")


def rule_of(target: Path, changes: Sequence[str] = ()) -> Promote:
    """The rule in the config of a run, or of a sweep's trials, with "min_id=0.75" and the like over it."""
    prefixed = [change if change.startswith("promote.") else f"promote.{change}" for change in changes]
    run_dir = trials_of(target)[0] if (target / SWEEP_FILE).is_file() else chosen_run(target)[0]
    return load_config(run_dir / "config.yaml", prefixed).promote


def trials_of(sweep: Path) -> list[Path]:
    """The directories of a sweep's trials, in the order of its grid."""
    try:
        content = json.loads((sweep / SWEEP_FILE).read_text(encoding="utf-8"))
        return [sweep / "trials" / trial["name"] for trial in content["trials"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{sweep / SWEEP_FILE}: cannot be read: {type(error).__name__} {error}") from error


def _chosen_trial(sweep: Path, rule: Promote | None) -> tuple[Path, str]:
    """By the rule that the report marks its chosen model by, among the trials that are evaluated."""
    names, points, allowed = [], {}, []
    for run_dir in trials_of(sweep):
        names.append(run_dir.name)
        if not (run_dir / "eval" / SUMMARY_FILE).is_file():
            continue
        summary = read_summary(run_dir / "eval")
        if (point := point_of(summary)) is None:
            continue
        points[run_dir.name] = point
        if holds(rule or load_config(run_dir / "config.yaml").promote, summary):
            allowed.append(run_dir.name)
    if not points:
        raise ConfigError(
            f"{sweep}: none of its {len(names)} trials has results of id and of another dataset on which the untouched "
            "model is better than guessing"
        )
    name = choose(points, allowed)
    one = points[name]
    told = f"chosen of {len(points)} trials: {name} (id {one.id:.4f}, kept {one.kept:.4f}, "
    told += f"least of {one.worst}, {one.worst_kept:.4f})"
    if len(allowed) < len(points):
        told += f"; the rule of promotion holds for {len(allowed) or 'none'} of them"
    left = len(names) - len(points)
    return sweep / "trials" / name, told + (f"; {left} without results" if left else "")
