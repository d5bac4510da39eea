"""The promotion rule, clause by clause, on given results."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Promote
from pipeline.selection.rule import check


def results(**changes: Any) -> dict[str, Any]:
    """Results with id 0.80 (+0.10), zero-shot 0.60 (-0.02), one of its sets down by 0.05."""
    groups = {
        "id": {"mean": 0.80, "change": 0.10, "missing": []},
        "zero-shot": {"mean": 0.60, "change": -0.02, "missing": []},
    }
    datasets = {
        "ours": {"group": "id", "value": 0.80, "change": 0.10},
        "pets": {"group": "zero-shot", "value": 0.70, "change": 0.01},
        "cars": {"group": "zero-shot", "value": 0.50, "change": -0.05},
    }
    return {"groups": groups, "datasets": datasets, "forgetting": 0.02} | changes


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ({"min_id": 0.8}, True),
        ({"min_id": 0.81}, False),
        ({"min_gain": 0.1}, True),
        ({"min_gain": 0.2}, False),
        ({"max_forgetting": 0.02}, True),
        ({"max_forgetting": 0.019}, False),
        ({"min_kept": 0.95}, True),
        ({"min_kept": 0.96}, False),
        ({"max_drop": 0.05}, True),
        ({"max_drop": 0.04}, False),
        ({"min_dataset": ("pets >= 0.7", "cars>=0.5")}, True),
        ({"min_dataset": ("pets >= 0.7", "cars>=0.51")}, False),
    ],
)
def test_each_clause_holds_up_to_its_limit(rule: dict[str, Any], holds: bool) -> None:
    clauses = check(Promote(**rule), results())
    assert all(clause.holds for clause in clauses) == holds
    failed = [str(clause) for clause in clauses if not clause.holds]
    assert len(failed) == (0 if holds else 1)


def test_the_kept_clause_names_the_worst_dataset() -> None:
    """The zero-shot sets: pets has risen and counts as 1, cars has 0.50 of 0.55."""
    (clause,) = check(Promote(min_kept=0.96), results())
    assert str(clause) == "FAILS  promote.min_kept: kept 0.9545, at least 0.96 required (least of cars, 0.9091)"


def test_a_failed_clause_says_what_was_found_and_what_was_asked() -> None:
    (clause,) = check(Promote(max_drop=0.04), results())
    assert str(clause) == "FAILS  promote.max_drop: largest drop 0.0500, at most 0.04 required (cars)"


def test_a_vits_classifier_is_compared_with_guessing() -> None:
    """The untouched ViT has none, so neither the id group nor its sets have a change."""
    found = results(classifier=True)
    found["groups"]["id"] = {"mean": 0.80, "change": None, "missing": []}
    own = {"group": "id", "in_mean": True, "value": 0.80, "chance": 0.25, "change": None}
    found["datasets"]["ours"] = own
    assert [str(clause) for clause in check(Promote(min_gain=0.55, max_drop=0.05), found)] == [
        "holds  promote.min_gain: gain of id 0.5500, at least 0.55 required",
        "holds  promote.max_drop: largest drop 0.0500, at most 0.05 required (cars)",
    ]
    found["datasets"]["ours"] = own | {"value": 0.10}
    (clause,) = check(Promote(max_drop=0.05), found)
    assert str(clause) == "FAILS  promote.max_drop: largest drop 0.1500, at most 0.05 required (ours)"


def test_no_rule_has_no_clauses() -> None:
    assert check(Promote(), results()) == []


def test_what_was_not_measured_does_not_hold() -> None:
    missing = results()
    missing["groups"]["id"]["missing"] = ["more"]
    missing["groups"]["zero-shot"]["change"] = None
    missing["datasets"]["cars"]["change"] = None
    rule = Promote(min_id=0.1, min_gain=0.0, max_forgetting=1.0, min_kept=0.0, max_drop=1.0, min_dataset=("dogs >= 0",))
    told = [str(clause) for clause in check(rule, missing)]
    assert all("FAILS" in line and "not known" in line for line in told)
    assert "not evaluated: more" in told[0]
    assert "no results of the untouched model for zero-shot" in told[2]
    assert "no results of the untouched model for zero-shot" in told[3]
    assert "cars" in told[4]
    assert "there are: ours, pets, cars" in told[5]


def test_forgetting_needs_a_group_beside_id() -> None:
    alone = results(groups={"id": {"mean": 0.8, "change": 0.1, "missing": []}}, forgetting=None)
    for rule in (Promote(max_forgetting=0.5), Promote(min_kept=0.5)):
        (clause,) = check(rule, alone)
        assert not clause.holds
        assert "only the id group" in str(clause)
