"""The choice of a model by gain and kept."""

import pytest

from pipeline.selection.candidates import Candidate, take
from pipeline.selection.ranking import Point, pareto_front, point_of

FORGOT_ALL = Point(id=0.9, kept=0.1, gain=0.5)
LEARNED_NOTHING = Point(id=0.4, kept=1.0, gain=0.0)
BALANCED = Point(id=0.85, kept=0.9, gain=0.45)
BEATEN = Point(id=0.8, kept=0.85, gain=0.4)


def choose(points: dict[str, Point], allowed: list[str] | None = None) -> str:
    """The name taken where each model is a configuration of its own."""
    return take([Candidate(name, name, one, allowed is None or name in allowed) for name, one in points.items()]).name


def _summary(**groups: tuple[float, float | None]) -> dict:
    """Groups of one dataset each, which has the group's name."""
    found = {name.replace("_", "-"): pair for name, pair in groups.items()}
    return {
        "groups": {name: {"mean": mean, "change": change, "missing": []} for name, (mean, change) in found.items()},
        "datasets": {name: {"group": name, "value": mean, "change": change} for name, (mean, change) in found.items()},
    }


def test_the_point_of_a_summary_needs_no_second_file() -> None:
    point = point_of(_summary(id=(0.9, 0.5), shift=(0.3, -0.3), zero_shot=(0.8, 0.0)))
    assert point is not None
    assert point[:3] == pytest.approx((0.9, 0.75, 0.5))
    assert point.worst == "shift" and point.worst_kept == pytest.approx(0.5)


def test_an_incomplete_summary_has_no_point() -> None:
    """A summary without the untouched model or with a missing dataset has no point."""
    assert point_of(_summary(id=(0.9, 0.5), shift=(0.3, None))) is None
    partial = _summary(id=(0.9, 0.5), shift=(0.3, -0.3))
    partial["groups"]["shift"]["missing"] = ["imagenet-a"]
    assert point_of(partial) is None


def test_the_front_holds_what_no_other_model_beats() -> None:
    points = {"forgot": FORGOT_ALL, "beaten": BEATEN, "balanced": BALANCED, "nothing": LEARNED_NOTHING}
    assert pareto_front(points) == ["nothing", "balanced", "forgot"]


def test_the_chosen_model_learned_and_kept() -> None:
    points = {"forgot": FORGOT_ALL, "beaten": BEATEN, "balanced": BALANCED, "nothing": LEARNED_NOTHING}
    assert choose(points) == "balanced"


def test_an_unfit_model_is_chosen_only_where_none_is_fit() -> None:
    """A model that may not be promoted is chosen only where none may."""
    points = {"forgot": FORGOT_ALL, "balanced": BALANCED, "nothing": LEARNED_NOTHING}
    assert choose(points, ["forgot", "nothing"]) == "forgot"
    assert choose(points, []) == choose(points) == "balanced"


def test_between_equals_the_first_name_wins_whatever_the_order() -> None:
    assert choose({"b": BALANCED, "a": BALANCED}) == choose({"a": BALANCED, "b": BALANCED}) == "a"


def test_when_no_model_gained_the_one_that_kept_most_is_chosen() -> None:
    assert choose({"a": Point(0.4, 0.8, -0.1), "b": Point(0.3, 0.9, -0.2)}) == "b"


def test_nothing_to_choose_from_is_an_error() -> None:
    """Nothing to choose from is an error that says what is missing."""
    with pytest.raises(ValueError, match="none has results"):
        choose({})
