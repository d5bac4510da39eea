"""Families of runs that a figure draws as one line: the same method at several ranks, lambdas and seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple, TypeVar

from pipeline.config import affects_result
from pipeline.report.records import Run

# Options that are shown on the axes of figures or in the names of methods.
_AXES = ("seed", "adapter.kind", "adapter.rank", "gate.lam", "gate.enabled")

Axis = TypeVar("Axis", int, float)


class Spread(NamedTuple):
    """Mean, lowest and highest value over the seeds of one configuration."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Family:
    """One method. `points`: {(rank, lambda): its runs, one per seed}; lambda is None without gates."""

    label: str
    kind: str
    gated: bool
    points: Mapping[tuple[int, float | None], Sequence[Run]]

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for rank, _ in self.points})

    @property
    def lams(self) -> list[float]:
        return sorted({lam for _, lam in self.points if lam is not None})

    def main_lam(self) -> float | None:
        """The lambda with the most ranks, the largest if there are several; None without gates."""
        counts = Counter(lam for _, lam in self.points if lam is not None)
        return max(counts, key=lambda lam: (counts[lam], lam)) if counts else None

    def by_rank(self, lam: float | None, value: Callable[[Run], float | None]) -> dict[int, Spread]:
        """{rank: value over the seeds at this lambda}, for ranks where a seed has one."""
        return _spreads((rank, runs, value) for (rank, each), runs in self.points.items() if each == lam)

    def by_lam(self, rank: int, value: Callable[[Run], float | None]) -> dict[float, Spread]:
        """{lambda: value over the seeds at this rank}; empty for families without gates."""
        points = self.points.items()
        return _spreads((lam, runs, value) for (each, lam), runs in points if each == rank and lam is not None)


def _spreads(entries: Iterable[tuple[Axis, Sequence[Run], Callable[[Run], float | None]]]) -> dict[Axis, Spread]:
    found = {}
    for key, runs, value in entries:
        numbers = [number for number in map(value, runs) if number is not None]
        if numbers:
            found[key] = Spread(mean(numbers), min(numbers), max(numbers))
    return dict(sorted(found.items()))


def families(runs: Iterable[Run]) -> list[Family]:
    """The families of adapters among the runs: LoRA before DoRA, ungated before gated, random blocks excluded."""
    members = [run for run in runs if run.settings.rank is not None and run.settings.random_k is None]
    named = labels(members)
    split: dict[tuple[str, bool, str], dict[tuple[int, float | None], list[Run]]] = {}
    for run in members:
        settings = run.settings
        assert settings.rank is not None
        points = split.setdefault((settings.kind, settings.gated, named[run.name]), {})
        points.setdefault((settings.rank, settings.lam), []).append(run)
    ordered = sorted(split.items(), key=lambda item: (item[0][0] != "lora", item[0][1]))
    return [Family(label, kind, gated, points) for (kind, gated, label), points in ordered]


def labels(runs: Iterable[Run]) -> dict[str, str]:
    """{run: its method, with the settings in which it differs from other runs of the method}."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.settings.method, []).append(run)
    differing = {method: _differing(each) for method, each in members.items()}
    return {
        run.name: method + "".join(f", {key} {run.config.get(key)}" for key in differing[method])
        for method, each in members.items()
        for run in each
    }


def configurations(runs: Iterable[Run]) -> list[list[Run]]:
    """Groups of runs that differ only by their seed, in the order of the first run of each group."""
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        key = tuple(
            sorted((name, str(value)) for name, value in run.config.items() if affects_result(name) and name != "seed")
        )
        found.setdefault(key, []).append(run)
    return list(found.values())


def _differing(runs: Sequence[Run]) -> list[str]:
    """Options that affect the result, are not on an axis, and differ among the runs of one method."""
    gated = runs[0].settings.gated
    keys = [
        key
        for key in runs[0].config
        if affects_result(key) and key not in _AXES and (gated or not key.startswith("gate."))
    ]
    return [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]
