"""Which run is meant by a directory: the run itself, or the chosen trial of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError, Promote, load_config
from pipeline.runs.results import EVAL, has_summary, read_summary
from pipeline.runs.run import CONFIG_FILE, is_run
from pipeline.runs.sweep import SWEEP_FILE, is_sweep, trial_dir, trial_dirs
from pipeline.selection.ranking import choose, point_of
from pipeline.selection.rule import holds


def chosen_run(target: Path, rule: Promote | None = None) -> tuple[Path, str]:
    """(run directory, how it was chosen or "") of a run or a sweep; ConfigError for any other directory.

    rule: what a trial should hold to be chosen (default: the rule in its config).
    """
    if is_sweep(target):
        return _chosen_trial(target, rule)
    if is_run(target):
        return target, ""
    raise ConfigError(f"{target} is neither a run (no {CONFIG_FILE}) nor a sweep (no {SWEEP_FILE})")


def rule_of(target: Path, changes: Sequence[str] = ()) -> Promote:
    """The rule in the config of a run, or of a sweep's trials, with "min_id=0.75" and the like over it."""
    prefixed = [change if change.startswith("promote.") else f"promote.{change}" for change in changes]
    run_dir = trial_dirs(target)[0] if is_sweep(target) else chosen_run(target)[0]
    return load_config(run_dir / CONFIG_FILE, prefixed).promote


def _chosen_trial(sweep: Path, rule: Promote | None) -> tuple[Path, str]:
    """By the rule that the report marks its chosen model by, among the trials that are evaluated."""
    names, points, allowed = [], {}, []
    for run_dir in trial_dirs(sweep):
        names.append(run_dir.name)
        if not has_summary(run_dir / EVAL):
            continue
        summary = read_summary(run_dir / EVAL)
        if (point := point_of(summary)) is None:
            continue
        points[run_dir.name] = point
        if holds(rule or load_config(run_dir / CONFIG_FILE).promote, summary):
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
    return trial_dir(sweep, name), told + (f"; {left} without results" if left else "")
