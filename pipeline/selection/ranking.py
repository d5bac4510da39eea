"""The choice among many fine-tuned models: gain on the user's data against the share kept of everything else.

The demo, the report and the promotion choose in the same way: the model marked in the figure is the one registered, so
a model that may not be registered is chosen only if none may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.selection.kept import kept_of


class Point(NamedTuple):
    """One model: its gain against the share that it kept.

    Attributes:
        id: mean of the id group in [0, 1].
        kept: see `kept_of`, in [0, 1].
        gain: of `id` over the untouched model, for a trained classifier over guessing.
        worst: the dataset with the smallest share kept.
        worst_kept: its result / result of the untouched model.
    """

    id: float
    kept: float
    gain: float
    worst: str = ""
    worst_kept: float = 1.0


def point_of(summary: Mapping[str, Any]) -> Point | None:
    """The point of the model in a summary.json; None while a dataset or the untouched model's result is missing."""
    groups = summary["groups"]
    if "id" not in groups or any(found["missing"] for found in groups.values()):
        return None
    gain, kept = gain_of(summary), kept_of(summary["datasets"])
    return None if gain is None or kept is None else Point(groups["id"]["mean"], kept.mean, gain, *kept[1:])


def gain_of(summary: Mapping[str, Any]) -> float | None:
    """The rise of the id mean over the untouched model (for a trained classifier: over guessing), None if not known."""
    found = summary["groups"]["id"]
    if found["change"] is not None or not summary.get("classifier"):
        return found["change"]
    own = [each for each in summary["datasets"].values() if each["group"] == "id" and each["in_mean"]]
    rises = [rise for each in own if (rise := rise_of(summary, each)) is not None]
    return sum(rises) / len(rises)


def rise_of(summary: Mapping[str, Any], dataset: Mapping[str, Any]) -> float | None:
    """The change of one of its datasets. A ViT without a trained classifier can only guess."""
    if dataset["change"] is None and summary.get("classifier") and dataset["group"] == "id":
        return dataset["value"] - dataset["chance"]
    return dataset["change"]


def pareto_front(points: Mapping[str, Point]) -> list[str]:
    """The models that no other model beats in both id and kept; by rising id, then name."""

    def beaten(one: Point) -> bool:
        return any(
            other.id >= one.id and other.kept >= one.kept and (other.id > one.id or other.kept > one.kept)
            for other in points.values()
        )

    return sorted((name for name, one in points.items() if not beaten(one)), key=lambda name: (points[name].id, name))


def balances(points: Mapping[str, Point], best_gain: float) -> dict[str, float]:
    """{name: harmonic mean of gain / best gain and kept}: neither half can win without the other."""
    return {name: _balance(point, best_gain) for name, point in points.items()}


def _balance(point: Point, best_gain: float) -> float:
    gain = max(0.0, point.gain / best_gain) if best_gain > 0 else 0.0
    return 2 * gain * point.kept / (gain + point.kept) if gain + point.kept > 0 else 0.0
