"""Which model of a sweep to take: the report marks it, the promotion registers it.

Trials that differ by their seed alone are one configuration, and the mean over its seeds decides. The standard
deviation over seeds is pooled over all configurations with several; two configurations differ if the 95 % t-interval of
the difference of their means does not contain 0. Among the configurations that do not differ from the best, the
cheapest is taken, and among its seeds the one nearest to the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from pipeline.selection.frontier import AtStrength
from pipeline.selection.ranking import Point, balances

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Candidate:
    """One evaluated model of a sweep.

    Attributes:
        name: name of its trial.
        configuration: the same for trials that differ by their seed alone.
        point: its gain and the share that it kept.
        allowed: whether the promotion rule holds for it.
        at_floor: its results at the strength that keeps the floor of the sweep; None in a sweep without a floor.
        cost: number of trained parameters that act; None: not known.
    """

    name: str
    configuration: str
    point: Point
    allowed: bool = True
    at_floor: AtStrength | None = None
    cost: int | None = None


class Estimate(NamedTuple):
    """The mean of a value over the seeds of a configuration.

    Attributes:
        half: half of the 95 % t-interval; None if no configuration has two seeds.
    """

    mean: float
    half: float | None
    seeds: int


@dataclass(frozen=True)
class Taken:
    """The chosen model.

    Attributes:
        name: name of its trial, the seed nearest to the mean of its configuration.
        estimates: configuration -> value over its seeds: id at the floor, or the balance of gain and kept.
        best: the configuration with the largest mean.
        equal: other configurations not separated from the best by an interval; with the best, if it is not taken.
    """

    name: str
    configuration: str
    best: str
    estimates: Mapping[str, Estimate]
    equal: tuple[str, ...]


def take(candidates: Sequence[Candidate]) -> Taken:
    """The model to take from a sweep.

    Configurations whose nearest seed may not enter the registry count only if there are no others. Of equally near
    seeds, as two always are, one that may is preferred.

    Raises:
        ValueError: there is no candidate.
    """
    if not candidates:
        raise ValueError("no model to choose from: none has results for id, another group and the untouched model")
    members: dict[str, list[Candidate]] = {}
    for one in candidates:
        members.setdefault(one.configuration, []).append(one)
    value = values_of(candidates)
    spread = SeedSpread.of([[value[one.name] for one in seeds] for seeds in members.values()])
    estimates = {name: spread.estimate([value[one.name] for one in seeds]) for name, seeds in members.items()}
    nearest = {name: _nearest(seeds, value, estimates[name].mean) for name, seeds in members.items()}
    in_question = [name for name, one in nearest.items() if one.allowed] or list(nearest)

    def rank(name: str) -> tuple[float, ...]:
        seeds = members[name]
        return -estimates[name].mean, -mean(one.point.kept for one in seeds), -mean(one.point.id for one in seeds)

    best = min(in_question, key=lambda name: (rank(name), name))
    equal = [name for name in in_question if name == best or spread.same(estimates[name], estimates[best])]
    taken = min(equal, key=lambda name: (_cost(nearest[name]), rank(name), name)) if len(equal) > 1 else best
    return Taken(nearest[taken].name, taken, best, estimates, tuple(name for name in equal if name != taken))


def _nearest(seeds: Sequence[Candidate], value: Mapping[str, float], middle: float) -> Candidate:
    return min(seeds, key=lambda one: (round(abs(value[one.name] - middle), 9), not one.allowed, one.name))


def _cost(one: Candidate) -> float:
    return math.inf if one.cost is None else one.cost  # 0 if all of its gates are closed


def values_of(candidates: Sequence[Candidate]) -> dict[str, float]:
    """{name: value for the comparison}: id at the floor if the sweep has one, else the balance of gain and kept."""
    if all(one.at_floor is not None for one in candidates):
        return {one.name: one.at_floor.id for one in candidates if one.at_floor is not None}
    pool = [one for one in candidates if one.allowed] or candidates
    return balances({one.name: one.point for one in candidates}, max(one.point.gain for one in pool))


@dataclass(frozen=True)
class SeedSpread:
    """The standard deviation over seeds, pooled over configurations, with its degrees of freedom (0: not known)."""

    deviation: float
    freedom: int

    @staticmethod
    def of(groups: Sequence[Sequence[float]]) -> SeedSpread:
        """Pool the values of each configuration's seeds."""
        freedom = sum(len(values) - 1 for values in groups)
        squares = sum((value - mean(values)) ** 2 for values in groups for value in values)
        return SeedSpread(math.sqrt(squares / freedom) if freedom else 0.0, freedom)

    def estimate(self, values: Sequence[float]) -> Estimate:
        """The mean of one configuration's values, with its interval."""
        half = self._reach(1 / len(values)) if self.freedom else None
        return Estimate(mean(values), half, len(values))

    def same(self, one: Estimate, other: Estimate) -> bool:
        """Whether the interval of the difference of two means contains 0; False without several seeds."""
        return bool(self.freedom) and abs(one.mean - other.mean) <= self._reach(1 / one.seeds + 1 / other.seeds)

    def _reach(self, share: float) -> float:
        from scipy.stats import t

        return float(t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.deviation * math.sqrt(share)
