"""One pass over the images of a dataset for any number of models: each image is read and decoded once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.data.eval_batches import EvalBatch, eval_loader
from pipeline.data.images import normalize
from pipeline.evaluation.dataset import Dataset, Settings
from pipeline.evaluation.encode import Encoder
from pipeline.evaluation.metrics import (
    ClassCounts,
    RecallCounts,
    classification_chance,
    interval,
    mean_recall,
    paper_names,
    retrieval_chance,
    retrieval_metrics,
)
from pipeline.evaluation.ranks import Ranks
from pipeline.evaluation.results import Identity, Result
from pipeline.evaluation.retrieval import Embeddings, embed_batch, join, recall_both_ways
from pipeline.evaluation.zeroshot import class_logits, classifier_head
from pipeline.model.clip import Clip, to_open_clip_state, weights_digest

Head = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass
class Subject:
    """A model under evaluation. Classifier heads are kept: many sets share class names and templates."""

    clip: Clip
    encoder: Encoder
    digest: str
    heads: dict[Head, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(clip: Clip, settings: Settings) -> Subject:
        """Move the model to the device, in eval mode."""
        digest = weights_digest(to_open_clip_state(clip.model))
        model = clip.model.to(settings.device).eval()
        return Subject(clip, Encoder(model, clip.tokenizer, settings.device, settings.precision), digest)

    def head(self, dataset: Dataset, ranks: Ranks) -> Tensor:
        key = dataset.classnames, dataset.templates
        if key not in self.heads:
            self.heads[key] = classifier_head(self.encoder, *key, ranks)
        return self.heads[key]

    def identity(self, dataset: Dataset, settings: Settings) -> Identity:
        return Identity(self.digest, dataset.digest, settings.precision, settings.preprocessing, settings.limit)


def evaluate_dataset(subjects: Sequence[Subject], dataset: Dataset, ranks: Ranks, settings: Settings) -> list[Result]:
    """A result for each model, of all ranks, on every rank; the models share one preprocessing.

    `seconds` is the time of the whole pass. A sample that cannot be read is a ConfigError that names it.
    """
    if any(subject.clip.preprocess_cfg != subjects[0].clip.preprocess_cfg for subject in subjects):
        raise ValueError("models that share a pass must share their preprocessing")
    started = time.perf_counter()
    with torch.inference_mode():
        outcomes = (_retrieval if dataset.row.is_retrieval else _classification)(subjects, dataset, ranks, settings)
    seconds = round(time.perf_counter() - started, 3)
    return [
        {
            "dataset": dataset.row.key,
            "model": subject.clip.name,
            "pretrained": subject.clip.pretrained,
            "task": "zeroshot_retrieval" if dataset.row.is_retrieval else "zeroshot_classification",
            "language": "en",
            "metrics": outcome.pop("metrics"),
            "metric": dataset.row.metric,
            **outcome,
            "total": len(dataset.data),
            "seconds": seconds,
            **asdict(subject.identity(dataset, settings)),
        }
        for subject, outcome in zip(subjects, outcomes, strict=True)
    ]


def _classification(
    subjects: Sequence[Subject], dataset: Dataset, ranks: Ranks, settings: Settings
) -> list[dict[str, Any]]:
    heads = [subject.head(dataset, ranks) for subject in subjects]

    def count_share() -> list[ClassCounts]:
        counts = [ClassCounts.empty(dataset.classes) for _ in subjects]
        for batch, pixels in _batches(subjects[0].clip, dataset, ranks, settings):
            for subject, head, own in zip(subjects, heads, counts, strict=True):
                own.add(class_logits(subject.encoder, head, pixels, dataset.row.subset), batch.labels)
        return counts

    shares = ranks.gather(count_share)
    return [_counted(ClassCounts.total(share[i] for share in shares), dataset) for i in range(len(subjects))]


def _counted(counts: ClassCounts, dataset: Dataset) -> dict[str, Any]:
    metrics = counts.metrics()
    value = metrics[dataset.row.metric]
    assert value is not None, "only acc5 may be"
    return {
        "metrics": metrics,
        "value": value,
        "interval": interval(value, counts.n, len(dataset.data)),
        "chance": classification_chance(dataset.classes),
        "n": counts.n,
        "classes": dataset.classes,
        "per_class_recall": counts.per_class_recall(),
        "confusion": counts.sparse_confusion(),
    }


def _retrieval(subjects: Sequence[Subject], dataset: Dataset, ranks: Ranks, settings: Settings) -> list[dict[str, Any]]:
    def embed_share() -> list[list[Embeddings]]:
        return [
            [embed_batch(subject.encoder, pixels, batch.captions) for subject in subjects]
            for batch, pixels in _batches(subjects[0].clip, dataset, ranks, settings)
        ]

    batches = [batch for share in ranks.gather(embed_share) for batch in share]
    outcomes = []
    for i in range(len(subjects)):
        embeddings = join(batch[i] for batch in batches)
        outcomes.append(_recalled(*recall_both_ways(embeddings, ranks, settings.device), dataset))
    return outcomes


def _recalled(image_to_text: RecallCounts, text_to_image: RecallCounts, dataset: Dataset) -> dict[str, Any]:
    metrics = retrieval_metrics(image_to_text, text_to_image)
    value = mean_recall(metrics)
    return {
        "metrics": metrics,
        "paper": paper_names(metrics),
        "value": value,
        # Texts of one image stand or fall together, so they count as one.
        "interval": interval(value, image_to_text.n, len(dataset.data)),
        "chance": retrieval_chance(image_to_text.n),
        "n": image_to_text.n,
        "texts": text_to_image.n,
    }


def _batches(clip: Clip, dataset: Dataset, ranks: Ranks, settings: Settings) -> Iterable[tuple[EvalBatch, Tensor]]:
    """This rank's contiguous part of the samples with their pixels: nothing padded, nothing dropped."""
    config = clip.preprocess_cfg
    loader = eval_loader(
        dataset.data,
        config,
        batch_size=settings.batch_size,
        rank=ranks.rank,
        world=ranks.size,
        workers=settings.workers,
        preprocessing=settings.preprocessing,
        limit=settings.limit,
        only=dataset.chosen,
        border=dataset.row.border,
        pin=settings.device.type == "cuda",
        pixels=settings.cache,
    )
    told = ""
    for batch in loader:
        if batch.trouble and batch.trouble != told:
            told = batch.trouble
            sys.stderr.write(f"{dataset.row.key}: {told}\n")
        yield batch, normalize(batch.images.to(settings.device), config["mean"], config["std"])
