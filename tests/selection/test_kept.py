"""The share of the untouched model's abilities that was kept, on given results."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.selection.kept import Kept, kept_of


def entry(before: float | None, after: float, **more: Any) -> dict[str, Any]:
    change = None if before is None else after - before
    return {
        "group": "shift", "in_mean": True, "value": after, "baseline": before, "change": change, "chance": 0.1, **more
    }  # fmt: skip


def test_what_rises_hides_nothing_that_falls() -> None:
    """A mean of ratios would say 101 %."""
    datasets = {"up": entry(0.4, 0.6), "down": entry(0.8, 0.4), "same": entry(0.5, 0.5)}
    assert kept_of(datasets) == pytest.approx(Kept((1 + 0.5 + 1) / 3, "down", 0.5))


def test_every_dataset_weighs_the_same_whatever_its_group() -> None:
    datasets = {"a": entry(0.5, 0.4), "b": entry(0.5, 0.4), "pairs": entry(0.2, 0.1, group="retrieval")}
    assert kept_of(datasets) == pytest.approx(Kept((0.8 + 0.8 + 0.5) / 3, "pairs", 0.5))


def test_neither_id_nor_what_is_outside_the_means_counts() -> None:
    datasets = {"own": entry(0.5, 0.1, group="id"), "stl10": entry(0.9, 0.1, in_mean=False), "a": entry(0.5, 0.45)}
    assert kept_of(datasets) == pytest.approx(Kept(0.9, "a", 0.9))


def test_where_the_untouched_model_guesses_nothing_can_be_kept() -> None:
    datasets = {"guessed": entry(0.1, 0.9), "zero": entry(0.0, 0.5, chance=0.0), "known": entry(0.5, 0.6)}
    assert kept_of(datasets) == pytest.approx(Kept(1.0, "known", 1.2))
    assert kept_of({"guessed": entry(0.1, 0.9)}) is None
    assert kept_of({"own": entry(0.5, 0.9, group="id")}) is None


def test_without_the_untouched_model_nothing_is_known() -> None:
    assert kept_of({"a": entry(0.5, 0.4), "b": entry(None, 0.4)}) is None


def test_results_written_before_there_was_a_baseline_are_read() -> None:
    old = {"a": {"group": "shift", "value": 0.4, "change": -0.1}, "b": {"group": "id", "value": 0.4, "change": None}}
    assert kept_of(old) == pytest.approx(Kept(0.8, "a", 0.8))
