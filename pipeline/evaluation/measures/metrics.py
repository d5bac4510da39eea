"""Counts that add up over ranks, and the metrics computed from them.

The definitions are those of CLIP_benchmark (`zeroshot_classification.evaluate`, `zeroshot_retrieval.evaluate`), so
that numbers are comparable with published ones: acc1 and acc5 from `topk` of the logits, mean per-class recall over the
classes that have a sample, retrieval recall@k = share of queries with at least one own partner among the first k.
Everything is kept as integer counts until the end: a sum over ranks is then exact, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOP_K = 5
RECALL_K = (1, 5, 10)
MEAN_RECALL_K = (1, 5)
Z95 = 1.959964


@dataclass
class ClassCounts:
    """The counts of a classification pass; `confusion` is (K, K) int64, row = true class, column = argmax."""

    confusion: Tensor
    top1: int = 0
    top5: int = 0
    n: int = 0

    @staticmethod
    def empty(classes: int) -> ClassCounts:
        return ClassCounts(torch.zeros(classes, classes, dtype=torch.int64))

    @staticmethod
    def total(parts: Iterable[ClassCounts]) -> ClassCounts:
        """Sum of the counts of all ranks."""
        first, *others = parts
        total = ClassCounts(first.confusion.clone(), first.top1, first.top5, first.n)
        for part in others:
            total.confusion += part.confusion
            total.top1 += part.top1
            total.top5 += part.top5
            total.n += part.n
        return total

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits (B, K) fp32, labels (B,) int64 in [0, K). A class at -inf is never predicted."""
        classes = self.confusion.shape[0]
        values, best = (each.cpu() for each in logits.topk(min(TOP_K, classes), dim=1))  # few numbers leave the device
        labels, predicted = labels.cpu(), logits.argmax(dim=1).cpu()
        hits = (best == labels[:, None]) & (values > -torch.inf)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.n += len(labels)
        cells = labels * classes + predicted
        self.confusion.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def metrics(self) -> dict[str, float | None]:
        """The metrics; acc5 is None with fewer than five classes, where CLIP_benchmark writes nan (not valid JSON)."""
        recalls = [recall for recall in self.per_class_recall() if recall is not None]
        return {
            "acc1": self.top1 / self.n,
            "acc5": self.top5 / self.n if self.confusion.shape[0] >= TOP_K else None,
            "mean_per_class_recall": float(np.mean(recalls)),
        }

    def per_class_recall(self) -> list[float | None]:
        """Recall of every class; None for a class without samples, which the mean omits, as in sklearn."""
        support = self.confusion.sum(dim=1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [hit / count if count else None for hit, count in zip(hits, support, strict=True)]

    def sparse_confusion(self) -> list[list[int]]:
        """The non-zero cells as [true class, predicted class, count]."""
        cells = self.confusion.nonzero()
        counts = self.confusion[cells[:, 0], cells[:, 1]]
        return [[*cell, count] for cell, count in zip(cells.tolist(), counts.tolist(), strict=True)]


@dataclass
class RecallCounts:
    """Numbers of queries of one direction, and of those with a partner among the first k, for each k of `RECALL_K`."""

    hits: tuple[int, ...] = (0,) * len(RECALL_K)
    n: int = 0

    @staticmethod
    def total(parts: Iterable[RecallCounts]) -> RecallCounts:
        parts = list(parts)
        hits = tuple(sum(column) for column in zip(*(part.hits for part in parts), strict=True))
        return RecallCounts(hits, sum(part.n for part in parts))

    def recalls(self) -> dict[int, float]:
        return {k: hit / self.n for k, hit in zip(RECALL_K, self.hits, strict=True)}


def retrieval_metrics(image_to_text: RecallCounts, text_to_image: RecallCounts) -> dict[str, float]:
    """CLIP_benchmark's names: `image_retrieval` retrieves an image for a text, `text_retrieval` a text for an image."""
    images, texts = text_to_image.recalls(), image_to_text.recalls()
    return {f"image_retrieval_recall@{k}": images[k] for k in RECALL_K} | {
        f"text_retrieval_recall@{k}": texts[k] for k in RECALL_K
    }


def paper_names(metrics: dict[str, float]) -> dict[str, float]:
    """The columns of the paper's tables 14 and 15: its IR looks for an image's text, its TR for a text's image."""
    sides = {"IR": "text", "TR": "image"}
    return {f"{name}@{k}": metrics[f"{side}_retrieval_recall@{k}"] for name, side in sides.items() for k in RECALL_K}


def mean_recall(metrics: dict[str, float]) -> float:
    """Mean of R@1 and R@5 in both directions, the retrieval column of the paper's tables 14 and 15."""
    values = [metrics[f"{side}_retrieval_recall@{k}"] for side in ("image", "text") for k in MEAN_RECALL_K]
    return sum(values) / len(values)


def interval(value: float, n: int, total: int) -> list[float]:
    """95 % Wilson interval for the result on all `total` samples, given `value` on `n` drawn from them.

    Both ends are `value` if n = total. For a mean over classes or recalls it is the interval of a share.
    """
    if n >= total:
        return [value, value]
    # Drawn without repetition: the fewer samples are left, the smaller the uncertainty.
    known = n * (total - 1) / (total - n)
    square = Z95**2 / known
    middle, half = value + square / 2, (square * (value * (1 - value) + square / 4)) ** 0.5
    return [(middle - half) / (1 + square), (middle + half) / (1 + square)]


def classification_chance(classes: int) -> float:
    return 1 / classes


def retrieval_chance(images: int) -> float:
    """Chance of `mean_recall`: a random ranking finds the one image of a text among the first k with k/n.

    For the texts of an image the chance is the same to first order: c captions among c·n texts, k·c/(c·n).
    """
    return sum(min(1.0, k / images) for k in MEAN_RECALL_K) / len(MEAN_RECALL_K)
