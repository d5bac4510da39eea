"""The images of an evaluation set in two parts: one to choose on, and one to report on.

A result on images that chose the model is too optimistic. The part of an image depends only on its dataset's key and
its own name, so it is the same in every run, on every machine and for every model.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import ConfigError
from pipeline.data.order import stable_hash
from pipeline.evaluation.datasets.rows import Part

CHOOSING_SHARE = 0.2
CHOOSING_MOST = 1000  # images of a dataset; for large sets some of them suffice


def of_part(part: Part, dataset: str, names: Sequence[str]) -> list[int]:
    """The rising positions in `names` of the images of a part; the two parts make up the whole.

    ConfigError if a set is too small to be divided.
    """
    if part == "all":
        return list(range(len(names)))
    if len(names) < 2:
        raise ConfigError(f"{dataset}: {len(names)} image is too few to choose on some and report on others")
    size = min(CHOOSING_MOST, max(1, int(CHOOSING_SHARE * len(names))))
    order = sorted(range(len(names)), key=lambda i: (stable_hash("part", dataset, names[i]), i))
    return sorted(order[:size] if part == "choosing" else order[size:])
