"""Weighted K-NN classification: how well a model's image features still separate the classes of its pretraining set.

As in DINO's eval_knn.py: features have unit length, and the k most similar images of a bank vote for their own class,
each with exp(similarity / temperature). The whole bank is never in memory: it arrives in pieces, of which only the
nearest k of each query are kept. Ranks search their own parts of the bank, and the results are merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.measures.metrics import ClassCounts

# Similarities computed at once: 32 MB of them, and 32 MB of keys.
_AT_ONCE = 2**22
_VOTES_AT_ONCE = 2**22
# Below the key of any similarity.
_NOBODY = torch.iinfo(torch.int64).min
_LOW, _MANTISSA = 0xFFFFFFFF, 0x7FFFFFFF


@dataclass
class Nearest:
    """The nearest images of a bank so far for each query: (Q, k) keys, best first. `queries` are (Q, D) in fp64."""

    queries: Tensor
    keys: Tensor

    @staticmethod
    def of(queries: Tensor, k: int, device: torch.device) -> Nearest:
        """Start with unit vectors (Q, D), before any image of the bank."""
        # In fp64 a similarity is the same in every piece of the bank; of the accelerators only CUDA has it.
        where = device if device.type == "cuda" else torch.device("cpu")
        keys = torch.full((len(queries), k), _NOBODY, dtype=torch.int64, device=where)
        return Nearest(queries.to(where, torch.float64), keys)

    def add(self, features: Tensor, numbers: Tensor) -> None:
        """Add a piece of the bank: unit vectors (B, D), and the images' numbers (B,) in the whole bank."""
        where, k = self.queries.device, self.keys.shape[1]
        features, numbers = features.to(where, torch.float64), numbers.to(where)
        rows = max(1, _AT_ONCE // (len(features) + k))
        for start in range(0, len(self.queries), rows):
            part = slice(start, start + rows)
            new = to_keys(self.queries[part] @ features.T, numbers)
            self.keys[part] = _best([self.keys[part], new], k)


def merged(shares: Iterable[Tensor]) -> Tensor:
    """The keys (Q, k) of the whole bank, from those of its parts."""
    parts = list(shares)
    return _best(parts, parts[0].shape[1])


def _best(keys: list[Tensor], k: int) -> Tensor:
    return torch.cat(keys, dim=1).topk(k, dim=1).values


def to_keys(similarities: Tensor, numbers: Tensor) -> Tensor:
    """(Q, B) int64 in the order of the similarities, rounded to fp32; among equal ones the lower number wins.

    No two keys are equal, so the first k do not depend on how the bank was cut.
    """
    bits = (similarities.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits >= 0, bits, bits ^ _MANTISSA).to(torch.int64)
    return (ordered << 32) | (_LOW - numbers)


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The similarities (fp32) and the numbers of the images."""
    ordered = keys >> 32
    bits = torch.where(ordered >= 0, ordered, ordered ^ _MANTISSA).to(torch.int32)
    return bits.view(torch.float32), _LOW - (keys & _LOW)


def class_votes(similarities: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Votes (Q, classes) of neighbours (Q, k), most similar first; a class without a neighbour gets 0.

    They are scaled so that the nearest votes with 1, which keeps the order and avoids overflow at any temperature.
    """
    similarities = similarities.to(torch.float64)
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def as_logits(votes: Tensor) -> Tensor:
    """Votes as logits without ties: among equal votes the lower label wins; -inf for a class without votes."""
    order = votes.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(0, -votes.shape[1], -1, dtype=torch.float32).expand_as(order)
    return torch.empty_like(places).scatter_(1, order, places).masked_fill(votes == 0, -torch.inf)


def count_votes(keys: Tensor, bank_labels: Tensor, labels: Tensor, classes: int, temperature: float) -> ClassCounts:
    """Counts over the queries with keys (Q, k) and true labels (Q,); `bank_labels` by number. All on the CPU."""
    counts = ClassCounts.empty(classes)
    for rows in torch.arange(len(keys)).split(max(1, _VOTES_AT_ONCE // classes)):
        similarities, numbers = from_keys(keys[rows])
        votes = class_votes(similarities, bank_labels[numbers], classes, temperature)
        counts.add(as_logits(votes), labels[rows])
    return counts
