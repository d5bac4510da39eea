"""The share of the untouched model's abilities that a fine-tuned model has kept, dataset by dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Kept(NamedTuple):
    """Shares of the untouched model's results.

    Attributes:
        mean: over the datasets, each counted as 1 at most, in [0, 1].
        worst: the dataset with the smallest share.
        worst_share: its result / result of the untouched model, above 1 if even this dataset has risen.
    """

    mean: float
    worst: str
    worst_share: float


def kept_of(datasets: Mapping[str, Mapping[str, Any]]) -> Kept | None:
    """The mean of min(1, after / before) over the datasets that count in groups other than id, and the worst of them.

    A dataset that has risen cannot hide one that has fallen. A dataset on which the untouched model is no better than
    guessing has nothing to keep and does not count.

    Args:
        datasets: the entries of a summary.json by their keys.

    Returns:
        None if no dataset counts, or if a result of the untouched model is not known.
    """
    others = {key: each for key, each in datasets.items() if each["group"] != "id" and each.get("in_mean", True)}
    if any(each["change"] is None for each in others.values()):
        return None
    before = {key: each.get("baseline", each["value"] - each["change"]) for key, each in others.items()}
    shares = {
        key: each["value"] / before[key]
        for key, each in others.items()
        if before[key] > max(0.0, each.get("chance", 0.0))
    }
    if not shares:
        return None
    worst = min(shares, key=shares.__getitem__)
    return Kept(sum(min(1.0, share) for share in shares.values()) / len(shares), worst, shares[worst])
