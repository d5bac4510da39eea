"""The largest strength that keeps a floor, on known curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config import ConfigError, Promote
from pipeline.selection.floor import Floor, strongest


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        (lambda alpha: 1 - 0.04 * alpha, 1.0),
        (lambda alpha: 1 - 0.2 * alpha, 0.25),
        (lambda alpha: 1 - 0.3 * alpha**3, 0.55),
        (lambda alpha: 1 - 0.3 * alpha**0.5, 0.0),
        (lambda alpha: 1.0 if alpha < 0.93 else 0.1, 0.9),
        (lambda alpha: 1 - 0.051 * (alpha > 0.05), 0.05),
    ],
)
def test_the_largest_strength_that_keeps_the_floor(kept: Callable[[float], float], wanted: float) -> None:
    tries: list[float] = []

    def margin(alpha: float) -> float:
        tries.append(alpha)
        return kept(alpha) - 0.95 + 1e-12

    alpha, margins = strongest(margin, untouched=0.05)
    assert alpha == pytest.approx(wanted)
    assert tries[0] == 1 and len(tries) == len(set(tries)) <= 8
    assert margins.keys() == set(tries)
    assert alpha == 0 or margins[alpha] >= 0


@pytest.mark.parametrize("power", [1.2, 1.6, 2.2])
@pytest.mark.parametrize("loss", [0.1, 0.3, 0.6])
def test_a_smooth_curve_takes_few_tries(power: float, loss: float) -> None:
    """By hand: α = (0.05 / loss)^(1 / power), down to the next twentieth."""
    alpha, margins = strongest(lambda alpha: 0.05 - loss * alpha**power, untouched=0.05)
    assert alpha == int(20 * (0.05 / loss) ** (1 / power)) / 20
    assert len(margins) <= 4


def test_a_floor_that_forbids_any_loss_is_looked_for_from_below() -> None:
    assert strongest(lambda alpha: -alpha, untouched=0.0)[0] == 0
    assert strongest(lambda _: 0.0, untouched=0.0)[0] == 1


def results(before: float, after: float) -> dict[str, Any]:
    own = {"mean": 0.8, "change": 0.1, "missing": []}
    other = {"mean": after, "change": after - before, "missing": []}
    return {
        "groups": {"id": own, "shift": other},
        "datasets": {"pets": {"group": "shift", "value": after, "change": after - before}},
        "forgetting": before - after,
    }


def test_a_floor_of_two_clauses_keeps_both() -> None:
    floor = Floor.of(Promote(min_kept=0.9, max_forgetting=0.02, min_id=0.99))
    assert str(floor) == "promote.min_kept >= 0.9 and promote.max_forgetting <= 0.02"
    assert floor.margin(results(0.5, 0.47)) == pytest.approx(0.02 - 0.03)
    assert floor.margin(results(0.1, 0.085)) == pytest.approx(0.85 - 0.9)
    assert floor.of_untouched == pytest.approx(0.02)


def test_a_mistake_names_the_options() -> None:
    with pytest.raises(ConfigError, match=r"promote\.min_kept .* promote\.max_forgetting"):
        Floor.of(Promote(min_id=0.5))
    only_id = {"groups": {"id": {"mean": 1, "change": 0, "missing": []}}, "datasets": {}, "forgetting": None}
    with pytest.raises(ConfigError, match="only the id group"):
        Floor.of(Promote(min_kept=0.5)).margin(only_id)
