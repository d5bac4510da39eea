"""The run of a directory: the run itself, or the chosen trial of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError, Promote, load_config
from pipeline.runs.results import EVAL, read_floors
from pipeline.runs.run import CONFIG_FILE, is_run
from pipeline.runs.sweep import SWEEP_FILE, floor_of, is_sweep, trial_dir, trial_dirs
from pipeline.selection.candidates import Candidate, Taken, take
from pipeline.selection.frontier import floors_of
from pipeline.selection.standings import candidates_of


def chosen_run(target: Path, rule: Promote | None = None) -> tuple[Path, str]:
    """(run directory, how it was chosen or "") of a run or a sweep; ConfigError for any other directory.

    rule: the promotion rule for the choice (default: the rule in each trial's config).
    """
    if is_sweep(target):
        return _chosen_trial(target, rule)
    if is_run(target):
        return target, ""
    raise ConfigError(f"{target} is neither a run (no {CONFIG_FILE}) nor a sweep (no {SWEEP_FILE})")


def strength_at_floor(target: Path, run_dir: Path, rule: Promote | None = None) -> float | None:
    """The strength at which a sweep with a floor has chosen a trial; None for a run, and without a floor.

    Args:
        rule: the promotion rule of the choice (default: the rule in each trial's config).

    Raises:
        ConfigError: the trial keeps the floor at strength 0 alone, so there is no model to export or register.
    """
    floor = floor_of(target) if is_sweep(target) else None
    if floor is None:
        return None
    alpha = floors_of(read_floors(run_dir / EVAL))[floor].alpha
    if alpha == 0:
        raise ConfigError(_untouched(target, run_dir, floor, rule))
    return alpha


def _untouched(sweep: Path, run_dir: Path, floor: float, rule: Promote | None) -> str:
    """Why the choice fell on a trial at strength 0, and what to do."""
    candidates = candidates_of(sweep, rule)
    above = [one for one in candidates if one.at_floor is not None and one.at_floor.alpha > 0]
    if not above:
        return (
            f"{sweep}: no trial keeps {floor:g} at any strength above 0, so the untouched model is the best there is; "
            "lower the floor, or train with reference data (section keep)"
        )
    start = f"{sweep}: the chosen trial {run_dir.name} keeps {floor:g} at strength 0 alone, the untouched model; "
    other = "promote another trial by its directory and --strength A"
    if all(one.allowed for one in above):
        return f"{start}it is the seed nearest to the mean of its configuration: lower the floor, or {other}"
    clauses = (rule or load_config(run_dir / CONFIG_FILE).promote).model_dump(exclude_none=True, exclude={"champion"})
    named = ", ".join(f"promote.{key}={value}" for key, value in clauses.items())
    holds = f"holds for {sum(one.allowed for one in above)} of {len(above)} trials that keep it at a strength above 0"
    return f"{start}the promotion rule ({named}) {holds}: relax the rule, lower the floor, or {other}"


def rule_of(target: Path, changes: Sequence[str] = ()) -> Promote:
    """The promotion rule of a run or of a sweep's trials, overridden by settings such as "min_id=0.75"."""
    prefixed = [change if change.startswith("promote.") else f"promote.{change}" for change in changes]
    run_dir = trial_dirs(target)[0] if is_sweep(target) else chosen_run(target)[0]
    return load_config(run_dir / CONFIG_FILE, prefixed).promote


def _chosen_trial(sweep: Path, rule: Promote | None) -> tuple[Path, str]:
    """Choose among the evaluated trials in the same way as the report."""
    candidates, trials, floor = candidates_of(sweep, rule), len(trial_dirs(sweep)), floor_of(sweep)
    if not candidates:
        at = "" if floor is None else f" at the floor of {floor:g}"
        raise ConfigError(
            f"{sweep}: none of its {trials} trials has results{at} of id and of another dataset on which the untouched "
            "model is better than guessing"
        )
    taken = take(candidates)
    return trial_dir(sweep, taken.name), _describe(taken, candidates, trials, floor)


def _describe(taken: Taken, candidates: Sequence[Candidate], trials: int, floor: float | None) -> str:
    one = next(each for each in candidates if each.name == taken.name)
    text = f"chosen of {len(candidates)} trials: {one.name} "
    if one.at_floor is None:
        text += f"(id {one.point.id:.4f}, kept {one.point.kept:.4f}, "
    else:
        text += f"(id {one.at_floor.id:.4f} at strength {one.at_floor.alpha:g}, kept {one.at_floor.kept:.4f}, "
    text += f"least of {one.point.worst}, {one.point.worst_kept:.4f})"
    allowed = sum(each.allowed for each in candidates)
    if allowed < len(candidates):
        text += f"; the promotion rule holds for {allowed or 'none'} of them"
    estimate = taken.estimates[taken.configuration]
    if estimate.half is not None:
        what = "balance" if floor is None else f"id at kept >= {floor:g}"
        text += f"; {estimate.seeds} seed{'s' * (estimate.seeds > 1)}, mean {what} {estimate.mean:.4f} ± "
        text += f"{estimate.half:.4f} (95 % t-interval), and this seed is the nearest to it"
    if taken.equal:
        text += f"; not separated by the intervals, and not cheaper: {', '.join(taken.equal)}"
    left = trials - len(candidates)
    return text + (f"; {left} without results" if left else "")
