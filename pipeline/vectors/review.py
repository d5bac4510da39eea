"""Review of a labelled set with a model: near-duplicates, doubtful labels and overlapping classes.

Each image votes for its label among its nearest neighbours, as in K-NN evaluation. Copies of an image add no
information about its label, so its near-duplicates are not among its neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.evaluation.measures.knn import Nearest, class_votes, from_keys

# Cosine from which two images are the same one in another size, crop or compression.
DUPLICATE = 0.985
NEIGHBOURS, TEMPERATURE = 15, 0.07
# An image is suspicious if its own label gets less than the first share of the votes, and another one at least the
# second.
OWN, OTHER = 0.1, 0.4
# Share of the images of two classes whose neighbours mostly have the other label.
OVERLAP = 0.1
_EXTRA = 10  # neighbours that may turn out to be copies


class Suspect(NamedTuple):
    """An image, and the shares of its neighbours' votes for its own label and for another one."""

    image: int
    label: int
    other: int
    own_share: float
    other_share: float


class Overlap(NamedTuple):
    """Two classes, and the share and number of their images that look like the other class."""

    first: int
    second: int
    share: float
    images: int


@dataclass(frozen=True)
class Review:
    """The findings.

    Attributes:
        duplicates: groups of near-duplicate images, largest first.
        suspects: images whose neighbours contradict their label, most certain first.
        overlaps: pairs of classes, most similar first.
    """

    duplicates: list[list[int]] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)

    def as_json(self, keys: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
        """The same by names."""
        return {
            "duplicates": [[keys[image] for image in group] for group in self.duplicates],
            "labels": [
                {
                    "image": keys[each.image],
                    "label": classes[each.label],
                    "neighbours": classes[each.other],
                    "share": round(each.other_share, 4),
                }
                for each in self.suspects
            ],
            "overlaps": [
                {"classes": [classes[each.first], classes[each.second]], "share": round(each.share, 4)}
                for each in self.overlaps
            ],
        }


def review(vectors: Tensor, labels: Sequence[int | None], classes: int, duplicate: float = DUPLICATE) -> Review:
    """Review a set.

    Args:
        vectors: (N, D) unit vectors, on the CPU.
        labels: labels of the images; None for an image without label, which can only be a near-duplicate.
        classes: number of labels.
        duplicate: cosine from which two images are near-duplicates.

    Returns:
        The findings; every search is exact.
    """
    count = len(vectors)
    k = min(NEIGHBOURS + _EXTRA + 1, count)
    nearest = Nearest.of(vectors, k, torch.device("cpu"))
    for part in torch.arange(count).split(4096):
        nearest.add(vectors[part], part)
    cosines, places = from_keys(nearest.keys)
    itself = places == torch.arange(count)[:, None]
    groups = _groups(cosines, places, itself, duplicate)
    if classes < 2:
        return Review(groups)
    known = torch.tensor([-1 if label is None else label for label in labels])
    shares = _shares(cosines, places, itself | (cosines >= duplicate), known, classes)
    return Review(groups, _suspects(shares, known), _overlaps(shares, known))


def _groups(cosines: Tensor, places: Tensor, itself: Tensor, duplicate: float) -> list[list[int]]:
    """Images connected by near-duplicates, each group and the groups in the order of the set, largest first."""
    above = (cosines >= duplicate) & ~itself
    root = list(range(len(places)))

    def find(image: int) -> int:
        while root[image] != image:
            root[image] = root[root[image]]
            image = root[image]
        return image

    for image, column in above.nonzero().tolist():
        first, second = sorted((find(image), find(int(places[image, column]))))
        root[second] = first
    members: dict[int, list[int]] = {}
    for image in sorted(set(above.nonzero()[:, 0].tolist()) | set(places[above].tolist())):
        members.setdefault(find(image), []).append(image)
    return sorted(members.values(), key=lambda group: (-len(group), group))


def _shares(cosines: Tensor, places: Tensor, skipped: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(N, classes) shares of the votes of the nearest labelled neighbours, copies excluded."""
    skipped = skipped | (labels[places] < 0)
    # the first NEIGHBOURS of the remaining ones, in their order
    usable = ~skipped & ((~skipped).cumsum(1) <= NEIGHBOURS)
    far = torch.where(usable, cosines, torch.full_like(cosines, -1e4))
    order = far.argsort(dim=1, descending=True, stable=True)
    votes = class_votes(far.gather(1, order), labels[places.gather(1, order)].clamp(min=0), classes, TEMPERATURE)
    votes[~usable.any(1)] = 0
    return votes / votes.sum(1, keepdim=True).clamp(min=1e-12)


def _suspects(shares: Tensor, labels: Tensor) -> list[Suspect]:
    own = shares.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    others = shares.scatter(1, labels.clamp(min=0)[:, None], -1)
    best = others.max(1)
    wrong = (labels >= 0) & (own < OWN) & (best.values >= OTHER)
    found = [
        Suspect(image, int(labels[image]), int(best.indices[image]), float(own[image]), float(best.values[image]))
        for image in wrong.nonzero()[:, 0].tolist()
    ]
    return sorted(found, key=lambda each: (each.own_share - each.other_share, each.image))


def _overlaps(shares: Tensor, labels: Tensor) -> list[Overlap]:
    """Pairs of classes by the images whose neighbours mostly have the label of the other."""
    seen = labels >= 0
    first = shares.argmax(1)
    sizes = Counter(labels[seen].tolist())
    pairs = zip(labels[seen].tolist(), first[seen].tolist(), strict=True)
    crossed = Counter((min(pair), max(pair)) for pair in pairs if pair[0] != pair[1])
    found = [
        Overlap(a, b, images / (sizes[a] + sizes[b]), images)
        for (a, b), images in crossed.items()
        if images / (sizes[a] + sizes[b]) >= OVERLAP
    ]
    return sorted(found, key=lambda each: (-each.share, each.first, each.second))
