"""The promotion rule: the config's clauses checked against the results of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Promote
from pipeline.selection.kept import kept_of
from pipeline.selection.ranking import gain_of, rise_of


@dataclass(frozen=True)
class Clause:
    """One requirement and the value that was found; None if it could not be determined, which counts as failed."""

    name: str
    value: float | None
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def margin(self) -> float | None:
        """How far the value is on the right side of the limit, below 0 on the wrong one."""
        if self.value is None:
            return None
        return self.value - self.least if self.least is not None else (self.most or 0.0) - self.value

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        sign, limit = ("at least", self.least) if self.least is not None else ("at most", self.most)
        found = "not known" if self.value is None else f"{self.value:.4f}"
        verdict = "holds" if self.holds else "FAILS"
        return f"{verdict}  {self.name} {found}, {sign} {limit:g} required" + (f" ({self.note})" if self.note else "")


def check(rule: Promote, summary: Mapping[str, Any]) -> list[Clause]:
    """All clauses of the rule, in a fixed order; an empty list for a rule without any."""
    return list(_clauses(rule, summary))


def holds(rule: Promote, summary: Mapping[str, Any]) -> bool:
    """Whether every clause of the rule holds."""
    return all(clause.holds for clause in check(rule, summary))


def _clauses(rule: Promote, summary: Mapping[str, Any]) -> Iterator[Clause]:
    groups = summary["groups"]
    own, others = groups.get("id"), [name for name in groups if name != "id"]
    if rule.min_id is not None:
        note = _missing(groups, ["id"])
        yield Clause("promote.min_id: mean of id", own["mean"] if own and not note else None, rule.min_id, note=note)
    if rule.min_gain is not None:
        note = _missing(groups, ["id"])
        gain = None if note else gain_of(summary)
        note = note or (_no_baseline(groups, ["id"]) if gain is None else "")
        yield Clause("promote.min_gain: gain of id", gain, rule.min_gain, note=note)
    if rule.max_forgetting is not None:
        note = _missing(groups, others) if others else "only the id group was evaluated"
        note = note or _no_baseline(groups, others)
        value = None if note else summary["forgetting"]
        yield Clause("promote.max_forgetting: mean drop", value, most=rule.max_forgetting, note=note)
    if rule.min_kept is not None:
        yield _kept(rule.min_kept, summary)
    if rule.max_drop is not None:
        yield _largest_drop(rule.max_drop, summary)
    for key, least in rule.floors().items():
        found = summary["datasets"].get(key)
        note = "" if found else f"not evaluated; there are: {', '.join(summary['datasets'])}"
        yield Clause(f"promote.min_dataset: {key}", found["value"] if found else None, least, note=note)


def _kept(least: float, summary: Mapping[str, Any]) -> Clause:
    groups, kept = summary["groups"], kept_of(summary["datasets"])
    others = [name for name in groups if name != "id"]
    note = _missing(groups, others) if others else "only the id group was evaluated"
    note = note or _no_baseline(groups, others)
    if not note and kept is None:
        note = "the untouched model is no better than guessing, so there is nothing to keep"
    if note or kept is None:
        return Clause("promote.min_kept: kept", None, least, note=note)
    return Clause("promote.min_kept: kept", kept.mean, least, note=f"least of {kept.worst}, {kept.worst_share:.4f}")


def _largest_drop(most: float, summary: Mapping[str, Any]) -> Clause:
    name = "promote.max_drop: largest drop"
    rises = {key: rise_of(summary, found) for key, found in summary["datasets"].items()}
    drops = {key: -rise for key, rise in rises.items() if rise is not None}
    if unknown := [key for key in rises if key not in drops]:
        return Clause(name, None, most=most, note=f"no result of the untouched model for {', '.join(unknown)}")
    worst = max(drops, key=drops.__getitem__)
    return Clause(name, drops[worst], most=most, note=worst)


def _missing(groups: Mapping[str, Any], names: list[str]) -> str:
    absent = [name for name in names if name not in groups]
    if absent:
        return f"group {', '.join(absent)} was not evaluated"
    missing = [key for name in names for key in groups[name]["missing"]]
    return f"not evaluated: {', '.join(missing)}" if missing else ""


def _no_baseline(groups: Mapping[str, Any], names: list[str]) -> str:
    lacking = [name for name in names if groups[name]["change"] is None]
    return f"no results of the untouched model for {', '.join(lacking)}" if lacking else ""
