"""How much a fine-tuned model has kept of what the untouched one could do, dataset by dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Kept(NamedTuple):
    """Shares of the untouched model's results.

    Attributes:
        mean: over the datasets, each counted as 1 at most, in [0, 1].
        worst: the dataset of which least was kept.
        worst_share: its result / result of the untouched model, above 1 where even this one has risen.
    """

    mean: float
    worst: str
    worst_share: float


def kept_of(datasets: Mapping[str, Mapping[str, Any]]) -> Kept | None:
    """The mean of min(1, after / before) over the datasets that count in a group other than id, and the worst of them.

    A dataset that has risen cannot hide one that has fallen. Where the untouched model is no better than guessing there
    is nothing to keep, so such a dataset does not count.

    Args:
        datasets: the entries of a summary.json by their keys.

    Returns:
        None where no dataset counts, and while the untouched model's result of one is not known.
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
