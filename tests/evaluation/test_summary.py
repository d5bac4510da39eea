"""Means, changes and forgetting, on made-up results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.evaluation.datasets.benchmark import Benchmark, Row
from pipeline.evaluation.summary import format_summary, summarise
from pipeline.runs.results import read_summary

MODEL = {"model": "tiny", "pretrained": None, "limit": None}


def row(key: str, group: str, in_mean: bool = True) -> Row:
    return Row.model_validate({"key": key, "group": group, "path": key, "in_mean": in_mean})


TABLE = Benchmark(
    "made",
    (
        row("own", "id"),
        row("v2", "shift"),
        row("sketch", "shift"),
        row("food", "zero-shot"),
        row("stl10", "zero-shot", in_mean=False),
        row("coco", "retrieval"),
    ),
)


def results(**values: float) -> dict[str, dict[str, Any]]:
    return {
        key: {"metric": "acc1", "value": value, "chance": 0.01, "n": 10, "dataset_digest": f"digest of {key}"}
        for key, value in values.items()
    }


BEFORE = summarise(TABLE, results(own=0.5, v2=0.4, sketch=0.6, food=0.8, stl10=0.9, coco=0.3), MODEL, None)
AFTER = results(own=0.7, v2=0.3, sketch=0.5, food=0.5, stl10=0.1, coco=0.5)


def test_means_are_over_the_rows_that_count_in_them() -> None:
    means = {group: each["mean"] for group, each in BEFORE["groups"].items()}
    assert means == pytest.approx({"id": 0.5, "shift": 0.5, "zero-shot": 0.8, "retrieval": 0.3})
    assert BEFORE["datasets"]["stl10"]["value"] == 0.9
    assert BEFORE["forgetting"] is None


def test_forgetting_is_the_mean_drop_outside_id() -> None:
    """Changes are against the baseline and forgetting is the mean drop outside id."""
    after = summarise(TABLE, AFTER, MODEL, BEFORE)
    changes = {group: each["change"] for group, each in after["groups"].items()}
    assert changes == pytest.approx({"id": 0.2, "shift": -0.1, "zero-shot": -0.3, "retrieval": 0.2})
    assert after["forgetting"] == pytest.approx((0.1 + 0.3 - 0.2) / 3)
    assert after["datasets"]["stl10"]["change"] == pytest.approx(-0.8)


def test_a_group_is_compared_over_the_same_rows_only() -> None:
    """A missing row is named and its group compared over the same rows only."""
    partial = {key: value for key, value in AFTER.items() if key != "sketch"}
    after = summarise(TABLE, partial, MODEL, BEFORE)
    assert after["groups"]["shift"]["missing"] == ["sketch"]
    assert after["groups"]["shift"]["change"] == pytest.approx(-0.1)
    assert "not evaluated: sketch" in format_summary(after)


@pytest.mark.parametrize(("key", "value"), [("dataset_digest", "other"), ("n", 9)])
def test_values_of_other_images_are_not_compared(key: str, value: Any) -> None:
    changed = AFTER | {"food": AFTER["food"] | {key: value}}
    after = summarise(TABLE, changed, MODEL, BEFORE)
    assert after["datasets"]["food"]["change"] is None
    assert after["groups"]["zero-shot"]["change"] is None
    assert after["forgetting"] == pytest.approx((0.1 - 0.2) / 2)


def test_the_printed_table_lines_up_and_shows_signed_changes() -> None:
    text = format_summary(summarise(TABLE, AFTER, MODEL, BEFORE))
    lines = text.splitlines()
    values = [line for line in lines if line.startswith(("id", "shift", "zero-shot", "retrieval"))]
    assert len(values) == 6 + 2 + 3
    assert any(line.split() == ["retrieval", "mean", "with", "id", "60.00"] for line in values)
    assert any(line.split() == ["id", "own", "acc1", "70.00", "+20.00", "1.00", "10"] for line in values)
    assert "stl10 (not in mean)" in text
    assert "forgetting 6.67 points" in lines[-1]


def test_a_file_that_is_no_summary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a selora-summary file, it has no datasets, groups"):
        read_summary(tmp_path)
    with pytest.raises(ConfigError, match="there is no such summary"):
        read_summary(tmp_path / "elsewhere.json")
