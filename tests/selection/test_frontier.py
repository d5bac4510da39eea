"""The accuracy of a run at a floor, read from a given curve."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.selection.frontier import AtStrength, curve_of, floors_of, id_at

CURVE = [AtStrength(0, 0.3, 1.0), AtStrength(0.5, 0.4, 0.98), AtStrength(1, 0.5, 0.88)]


@pytest.mark.parametrize(
    ("floor", "wanted"), [(1.0, 0.3), (0.99, 0.35), (0.98, 0.4), (0.93, 0.45), (0.88, 0.5), (0.5, 0.5)]
)
def test_id_at_a_floor_is_on_the_line_between_two_points(floor: float, wanted: float) -> None:
    assert id_at(CURVE, floor) == pytest.approx(wanted)


def test_a_curve_that_recovers_counts_at_its_largest_strength() -> None:
    assert id_at([*CURVE[:2], AtStrength(0.8, 0.45, 0.9), AtStrength(1, 0.47, 0.96)], 0.95) == 0.47
    assert id_at([], 0.9) is None


def written() -> dict[str, Any]:
    return {
        "groups": {"0.0": {"id": 0.3, "shift": 0.5}, "1.0": {"id": 0.5, "shift": 0.5}},
        "datasets": {"0.0": {"own": 0.3, "a": 0.4, "b": 0.6}, "1.0": {"own": 0.5, "a": 0.2, "b": 0.8}},
    }


def test_a_curve_of_the_version_before_has_kept_by_dataset() -> None:
    """The group's mean has not moved, and half of one dataset is lost."""
    datasets = {name: {"group": "id" if name == "own" else "shift", "value": 0.0} for name in ("own", "a", "b")}
    found = [tuple(each) for each in curve_of(written(), datasets)]
    assert found == [pytest.approx((0, 0.3, 1.0)), pytest.approx((1, 0.5, 0.75))]
    without = written()
    del without["groups"]["0.0"]
    assert curve_of(without, datasets) == []


@pytest.mark.parametrize(("key", "floor"), [("0.97", 0.97), ("1", 1.0), ("1.0", 1.0), ("0.9666667", 0.9666667)])
def test_a_floor_is_found_by_its_value(key: str, floor: float) -> None:
    """Files of earlier versions have the key "1" of a floor of 1.0."""
    assert floors_of({"floors": {key: {"alpha": 0.5, "id": 0.4, "kept": None}}}) == {floor: AtStrength(0.5, 0.4, 0.0)}
