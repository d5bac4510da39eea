"""Metrics against clip_benchmark's own functions on random logits and embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics.zeroshot_classification import accuracy
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from sklearn.metrics import balanced_accuracy_score

from pipeline.evaluation.measures.metrics import (
    RECALL_K,
    ClassCounts,
    mean_recall,
    retrieval_chance,
    retrieval_metrics,
)
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.measures.retrieval import Embeddings, join, recall_both_ways
from pipeline.evaluation.measures.zeroshot import apply_subset


def random_logits(n: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator) + 2 * F.one_hot(labels, classes)
    return logits, labels


def counted(logits: torch.Tensor, labels: torch.Tensor, batch: int = 7) -> ClassCounts:
    counts = ClassCounts.empty(logits.shape[1])
    for start in range(0, len(labels), batch):
        counts.add(logits[start : start + batch], labels[start : start + batch])
    return counts


@pytest.mark.parametrize(("n", "classes"), [(101, 5), (40, 30), (250, 12)])
def test_classification_metrics_are_those_of_clip_benchmark(n: int, classes: int) -> None:
    logits, labels = random_logits(n, classes)
    metrics = counted(logits, labels).metrics()
    acc1, acc5 = accuracy(logits, labels, topk=(1, 5))
    assert metrics["acc1"] == acc1
    assert metrics["acc5"] == acc5
    assert metrics["mean_per_class_recall"] == balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert 0 < acc1 <= acc5 <= 1


def test_a_class_without_a_sample_is_not_in_the_mean() -> None:
    """A class without a sample stays out of the mean and is marked."""
    logits, labels = random_logits(60, 9)
    labels = labels.where(labels != 4, torch.tensor(5))
    counts = counted(logits, labels)
    assert counts.per_class_recall()[4] is None
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert counts.metrics()["mean_per_class_recall"] == expected


def test_acc5_is_absent_below_five_classes() -> None:
    metrics = counted(*random_logits(30, 4)).metrics()
    assert metrics["acc5"] is None
    assert metrics["acc1"] is not None


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    logits, labels = random_logits(97, 11)
    whole = counted(logits, labels)
    parts = ClassCounts.total(
        [counted(logits[:13], labels[:13]), ClassCounts.empty(11), counted(logits[13:], labels[13:])]
    )
    assert torch.equal(whole.confusion, parts.confusion)
    assert (whole.top1, whole.top5, whole.n) == (parts.top1, parts.top5, parts.n)


def test_the_sparse_confusion_holds_every_sample_once() -> None:
    logits, labels = random_logits(97, 11)
    dense = np.zeros((11, 11), dtype=int)
    for true, predicted, count in counted(logits, labels).sparse_confusion():
        dense[true, predicted] += count
    expected = np.zeros((11, 11), dtype=int)
    np.add.at(expected, (labels.numpy(), logits.argmax(dim=1).numpy()), 1)
    assert (dense == expected).all()


def test_the_subset_rule_is_argmax_among_the_listed_classes() -> None:
    logits, _ = random_logits(80, 20, seed=5)
    subset = [17, 3, 11, 0, 8, 19]
    labels = torch.randint(len(subset), (80,), generator=torch.Generator().manual_seed(1))
    reference = np.array([max(range(len(subset)), key=lambda j: row[subset[j]]) for row in logits.numpy()])
    counts = ClassCounts.empty(len(subset))
    counts.add(apply_subset(logits, [[each] for each in subset]), labels)
    assert counts.top1 == int((reference == labels.numpy()).sum())
    assert torch.equal(apply_subset(logits, None), logits)


def random_embeddings(images: int, seed: int, most: int = 6) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    per_image = torch.randint(1, most + 1, (images,), generator=generator)
    owner = torch.arange(images).repeat_interleave(per_image)
    vectors = torch.randn(images, 16, generator=generator)
    texts = vectors[owner] + 1.5 * torch.randn(len(owner), 16, generator=generator)
    return Embeddings(F.normalize(vectors, dim=-1), F.normalize(texts, dim=-1), owner)


@pytest.mark.parametrize("images", [12, 64, 700])
def test_recalls_are_those_of_clip_benchmark(images: int) -> None:
    embeddings = random_embeddings(images, seed=images)
    scores = embeddings.texts @ embeddings.images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), embeddings.owner] = True
    to_text, to_image = recall_both_ways(embeddings, Ranks(), torch.device("cpu"))
    metrics = retrieval_metrics(to_text, to_image)
    for k in RECALL_K:
        for name, each, own in (("image", scores, positive), ("text", scores.T, positive.T)):
            hits = torch.cat([recall_at_k(each[i : i + 50], own[i : i + 50], k) > 0 for i in range(0, len(each), 50)])
            assert metrics[f"{name}_retrieval_recall@{k}"] == int(hits.sum()) / len(hits)
    assert 0 < metrics["text_retrieval_recall@1"] < metrics["text_retrieval_recall@10"]


def test_fewer_items_than_k_are_all_looked_at() -> None:
    to_text, to_image = recall_both_ways(random_embeddings(3, seed=0, most=1), Ranks(), torch.device("cpu"))
    assert to_text.recalls()[5] == to_image.recalls()[10] == 1.0


def test_joined_batches_keep_the_owner_of_each_text() -> None:
    a, b = random_embeddings(4, seed=1), random_embeddings(5, seed=2)
    both = join([a, b])
    assert both.owner.tolist() == a.owner.tolist() + [4 + i for i in b.owner.tolist()]
    assert (len(both.images), len(both.texts)) == (9, len(a.texts) + len(b.texts))


def test_mean_recall_is_that_of_the_papers_tables() -> None:
    """Mean recall is that of the paper's tables and chance fits it."""
    metrics = {f"{side}_retrieval_recall@{k}": v for side, v in (("image", 0.2), ("text", 0.6)) for k in (1, 5)}
    metrics |= {"image_retrieval_recall@10": 1.0, "text_retrieval_recall@10": 1.0}
    assert mean_recall(metrics) == pytest.approx(0.4)
    blind = random_embeddings(400, seed=3, most=5)
    blind.texts = F.normalize(torch.randn(blind.texts.shape, generator=torch.Generator().manual_seed(9)), dim=-1)
    measured = mean_recall(retrieval_metrics(*recall_both_ways(blind, Ranks(), torch.device("cpu"))))
    assert measured == pytest.approx(retrieval_chance(400), abs=0.006)
