"""The trials of a sweep as candidates, read from their directories, and a comparison of their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Promote, load_config
from pipeline.runs.results import EVAL, has_summary, read_floors, read_summary, reported_at
from pipeline.runs.run import CONFIG_FILE, acting_parameters
from pipeline.runs.sweep import read_state, read_sweep, trial_dir
from pipeline.selection.candidates import Candidate, take
from pipeline.selection.frontier import floors_of
from pipeline.selection.ranking import point_of
from pipeline.selection.rule import holds


def candidates_of(sweep_dir: Path, rule: Promote | None = None) -> list[Candidate]:
    """The evaluated trials of a sweep, in its order; with a floor, those that were evaluated at it.

    Args:
        rule: the promotion rule; None: the one in each trial's config.
    """
    content = read_sweep(sweep_dir)
    found = (_candidate(sweep_dir, entry, content.get("floor"), rule) for entry in content["trials"])
    return [one for one in found if one is not None]


def _candidate(sweep: Path, entry: Mapping[str, Any], floor: float | None, rule: Promote | None) -> Candidate | None:
    run_dir = trial_dir(sweep, entry["name"])
    if not has_summary(run_dir / EVAL):
        return None
    summary, at_floor = read_summary(run_dir / EVAL), None
    if floor is not None:
        at_floor = floors_of(read_floors(run_dir / EVAL)).get(floor)
        if at_floor is None:
            return None
        if at_floor.alpha > 0:
            summary = read_summary(run_dir / reported_at(at_floor.alpha))
    if (point := point_of(summary)) is None:
        return None
    allowed = holds(rule or load_config(run_dir / CONFIG_FILE).promote, summary)
    allowed = allowed and (at_floor is None or at_floor.alpha > 0)  # at 0 there is nothing to register
    return Candidate(entry["name"], configuration_of(entry), point, allowed, at_floor, acting_parameters(run_dir))


def configuration_of(entry: Mapping[str, Any]) -> str:
    """The configuration of an entry of sweep.json, shared with its other seeds; the entry's name in an older sweep."""
    return entry.get("configuration") or entry["name"]


def standings(sweep_dir: Path) -> str:
    """Each configuration with its mean over seeds and the interval; empty if none has several seeds."""
    content, candidates = read_sweep(sweep_dir), candidates_of(sweep_dir)
    configurations: dict[str, list[str]] = {}
    for entry in content["trials"]:
        configurations.setdefault(configuration_of(entry), []).append(entry["name"])
    if all(len(names) < 2 for names in configurations.values()) or not candidates:
        return ""
    taken, floor = take(candidates), content.get("floor")
    what = "balance of gain and kept" if floor is None else f"id at kept >= {100 * floor:g} %"
    lines = [("configuration", "seeds", f"{what}, mean ± 95 % t-interval", "")]
    for name, names in configurations.items():
        estimate = taken.estimates.get(name)
        here = 0 if estimate is None else estimate.seeds
        shown = "" if estimate is None else f"{100 * estimate.mean:.2f}"
        shown += f" ± {100 * estimate.half:.2f}" if estimate is not None and estimate.half is not None else ""
        remark = ""
        if name in taken.equal:
            remark = (
                "the best, but equal within the intervals to a cheaper one"
                if name == taken.best
                else "equal to the best"
            )
        if name == taken.configuration:
            remark = f"taken: {taken.name}" + ("" if name == taken.best else ", equal to the best and cheaper")
        lost = [each for each in names if read_state(trial_dir(sweep_dir, each)).status in ("failed", "stopped")]
        remark += f"{'; ' if remark else ''}without {', '.join(lost)}" if lost else ""
        lines.append((name, f"{here} of {len(names)}", shown, remark))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, line[:3], widths), line[3]]).rstrip() for line in lines)
