"""The drift from which a run forgets too much, learned from finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

PREFIX = "keep/drift_"  # metrics: distance to the untouched model on held-out reference images, and on texts


def largest_drift(values: Mapping[str, float]) -> float | None:
    """The larger one of a run's drifts at a step; None without reference data."""
    found = [value for name, value in values.items() if name.startswith(PREFIX)]
    return max(found, default=None)


def last_drift(history: Mapping[str, Sequence[tuple[int, float]]]) -> float | None:
    """The drift at the end of a run, from {metric: [(step, value)]}."""
    return largest_drift({name: series[-1][1] for name, series in history.items() if series})


def learned_limit(pairs: Iterable[tuple[float, float]], floor: float) -> float | None:
    """The largest drift among the runs (drift, share kept) that kept the floor; None if none did.

    A limit at this drift would have stopped none of them.
    """
    return max((drift for drift, kept in pairs if kept >= floor), default=None)
