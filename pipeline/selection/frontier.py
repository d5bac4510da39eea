"""The accuracy of a run at a floor, read from its strength curve: the number by which methods are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.selection.kept import kept_of

FLOORS = (0.99, 0.95, 0.90)  # shares kept


class AtStrength(NamedTuple):
    """A run's model at one strength: mean of the id group and share kept, both in [0, 1]."""

    alpha: float
    id: float
    kept: float


def curve_of(strength: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]]) -> list[AtStrength]:
    """The points of a strength.json by rising α.

    Args:
        datasets: the entries of the run's summary.json, with the group and chance level of each.

    Returns:
        Empty if the curve does not start at the untouched model or lacks a group.
    """
    by_alpha = {float(alpha): (alpha, means) for alpha, means in strength["groups"].items()}
    values = strength.get("datasets", {})
    if 0.0 not in by_alpha or any("id" not in means for _, means in by_alpha.values()):
        return []
    untouched = values.get(by_alpha[0.0][0], {})
    found = []
    for alpha, (name, means) in sorted(by_alpha.items()):
        now = values.get(name, {})
        entries = {
            key: {**each, "value": now[key], "baseline": untouched[key], "change": now[key] - untouched[key]}
            for key, each in datasets.items()
            if key in now and key in untouched
        }
        if (kept := kept_of(entries)) is None:
            return []
        found.append(AtStrength(alpha, means["id"], kept.mean))
    return found


def floors_of(content: Mapping[str, Any] | None) -> dict[float, AtStrength]:
    """{share kept: the model at the largest strength that keeps it} from the content of a floors.json; {} for None.

    α was chosen on images other than those of id and kept; a model with nothing to keep there counts as keeping 0.
    """
    entries = {} if content is None else content["floors"]
    return {float(floor): AtStrength(each["alpha"], each["id"], each["kept"] or 0.0) for floor, each in entries.items()}


def id_at(curve: Sequence[AtStrength], floor: float) -> float | None:
    """The id mean at the largest strength that keeps the floor, on straight lines between the points of a curve.

    Returns:
        None for an empty curve.
    """
    if not curve:
        return None
    last = max(i for i, each in enumerate(curve) if each.kept >= floor or i == 0)
    if last == len(curve) - 1:
        return curve[-1].id
    here, beyond = curve[last], curve[last + 1]
    share = (here.kept - floor) / (here.kept - beyond.kept) if here.kept > beyond.kept else 0.0
    return here.id + share * (beyond.id - here.id)
