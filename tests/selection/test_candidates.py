"""Several seeds of a configuration: the mean decides, and configurations that no interval separates are equal."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, stdev

import pytest
from scipy.stats import ttest_ind

from pipeline.selection.candidates import Candidate, SeedSpread, take
from pipeline.selection.frontier import AtStrength
from pipeline.selection.ranking import Point

POINT = Point(0.9, 0.5, 0.1)


def models(configuration: str, *ids: float, cost: int | None = None, allowed: bool = True) -> list[Candidate]:
    """A model for each id, reached at a floor."""
    return [
        Candidate(
            f"{configuration}_seed{i}", configuration, Point(0.9, 0.5, 0.1), allowed, AtStrength(0.5, id_, 0.95), cost
        )
        for i, id_ in enumerate(ids)
    ]


def test_the_mean_decides_and_its_nearest_seed_is_taken() -> None:
    """The best single seed is of the configuration whose mean is lower."""
    taken = take([*models("a", 0.40, 0.41, 0.42), *models("b", 0.20, 0.21, 0.47)])
    assert (taken.configuration, taken.name) == ("a", "a_seed1")
    assert taken.estimates["b"].mean == pytest.approx(mean([0.20, 0.21, 0.47]))


def test_the_pooled_interval_is_that_of_a_t_test() -> None:
    """Two groups: scipy's test with equal variances calls them different exactly where the interval leaves out 0."""
    groups = [0.40, 0.42, 0.41], [0.425, 0.43, 0.44]
    spread = SeedSpread.of(groups)
    one, other = map(spread.estimate, groups)
    assert spread.deviation == pytest.approx(((stdev(groups[0]) ** 2 + stdev(groups[1]) ** 2) / 2) ** 0.5)
    interval = ttest_ind(*groups).confidence_interval(0.95)
    assert (one.mean - other.mean) + (one.half or 0) * 2**0.5 == pytest.approx(interval.high)
    assert spread.same(one, other) == (interval.low <= 0 <= interval.high)
    far = spread.estimate([0.5, 0.5, 0.5])
    assert not spread.same(one, far)


def test_of_equal_configurations_the_cheaper_one_is_taken() -> None:
    close = [*models("large", 0.42, 0.44, 0.43, cost=900), *models("small", 0.41, 0.44, 0.43, cost=100)]
    taken = take([*close, *models("poor", 0.20, 0.21, 0.22, cost=1)])
    assert (taken.configuration, taken.best, taken.equal) == ("small", "large", ("large",))
    assert take([*close, *models("best", 0.60, 0.61, 0.62, cost=9999)]).configuration == "best"


def test_no_parameters_cost_least_and_an_unknown_number_most() -> None:
    values = (0.42, 0.44, 0.43)
    closed, small, unknown = (models(f"cost_{cost}", *values, cost=cost) for cost in (0, 100, None))
    assert take([*unknown, *small, *closed]).configuration == "cost_0"
    assert take([*unknown, *small]).configuration == "cost_100"


def test_without_several_seeds_the_largest_value_is_taken() -> None:
    taken = take([*models("dear", 0.42, cost=900), *models("cheap", 0.41, cost=1)])
    assert (taken.configuration, taken.equal, taken.estimates["dear"].half) == ("dear", (), None)


def test_a_configuration_that_lost_a_seed_counts_the_others() -> None:
    taken = take([*models("a", 0.40, 0.41, 0.42), *models("b", 0.55)])
    assert (taken.configuration, taken.estimates["b"].seeds) == ("b", 1)
    assert taken.estimates["b"].half == pytest.approx((taken.estimates["a"].half or 0) * 3**0.5)


def test_the_unregistrable_is_taken_only_where_all_are() -> None:
    wild, mild = models("wild", 0.6, 0.61, allowed=False), models("mild", 0.4, 0.41)
    assert take([*wild, *mild]).configuration == "mild"
    assert take(wild).configuration == "wild"


@pytest.mark.parametrize("unfit", [0, 1])
def test_of_two_seeds_the_one_that_may_be_promoted_is_taken(unfit: int) -> None:
    """Both are equally near to their mean, so the order of their names must not decide."""
    pair = models("good", 0.6, 0.62)
    pair[unfit] = replace(pair[unfit], allowed=False)
    assert take([*pair, *models("poor", 0.4, 0.41)]).name == f"good_seed{1 - unfit}"
