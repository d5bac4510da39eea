"""One pass over the images of a dataset for any number of models: each image is read and decoded once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.data.classnames import by_plain_name, plain_name
from pipeline.data.eval.batches import EvalBatch, eval_loader
from pipeline.data.eval.wds_layout import EvalSet
from pipeline.data.images import normalize
from pipeline.evaluation.datasets.dataset import Dataset, Settings
from pipeline.evaluation.datasets.rows import Row, Task
from pipeline.evaluation.measures.encode import Encoder
from pipeline.evaluation.measures.knn import Nearest, count_votes, merged
from pipeline.evaluation.measures.metrics import (
    ClassCounts,
    RecallCounts,
    classification_chance,
    interval,
    mean_recall,
    paper_names,
    retrieval_chance,
    retrieval_metrics,
)
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.measures.retrieval import Embeddings, embed_batch, join, recall_both_ways
from pipeline.evaluation.measures.zeroshot import apply_subset, class_logits, classifier_head
from pipeline.evaluation.results import Identity, Result
from pipeline.model.load import Model
from pipeline.model.text import batch_tokenizer
from pipeline.model.vit import Vit
from pipeline.model.weights import stock_state, weights_digest

Head = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass
class Subject:
    """A model under evaluation. Classifier heads are kept, because many sets share class names and templates."""

    model: Model
    encoder: Encoder
    digest: str
    heads: dict[Head, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: Model, settings: Settings) -> Subject:
        """Move the model to the device, in eval mode."""
        digest = weights_digest(stock_state(model.model))
        module = model.model.to(settings.device).eval()
        tokenizer = None if isinstance(model, Vit) else batch_tokenizer(module, model.tokenizer)
        return Subject(model, Encoder(module, tokenizer, settings.device, settings.precision), digest)

    def unable(self, dataset: Dataset) -> str | None:
        """Why this model cannot be evaluated on a row; None if it can."""
        if not isinstance(self.model, Vit):
            return None
        if dataset.row.task == "knn_classification":
            return None
        if dataset.row.is_retrieval:
            return "the model reads no texts"
        if self.model.classes is None:
            return "the untouched model has no classifier"
        known = by_plain_name(self.model.classes, "the model")
        wanted = by_plain_name(dataset.classnames, dataset.row.key)
        # A set of group id may lack classes. Another set that happens to share some is not a target set.
        if wanted.keys() != known.keys() and (dataset.row.group != "id" or not wanted.keys() <= known.keys()):
            return "the model was trained for other classes"
        return None

    def scorer(self, dataset: Dataset, ranks: Ranks) -> Callable[[Tensor], Tensor]:
        """Images (B, 3, H, W) -> logits (B, classes of the dataset): zero-shot, or from the model's own classifier."""
        subset = dataset.row.subset
        if isinstance(self.model, Vit):
            # The outputs for the classes of the dataset, which may lack some of the model's or be in another order.
            known = {plain_name(name): column for column, name in enumerate(self.model.classes or ())}
            columns = [known[plain_name(name)] for name in dataset.classnames]
            return lambda images: apply_subset(self.encoder.scores(images)[:, columns], subset)
        head = self.head(dataset, ranks)
        return lambda images: class_logits(self.encoder, head, images, subset)

    def head(self, dataset: Dataset, ranks: Ranks) -> Tensor:
        key = dataset.classnames, dataset.templates
        if key not in self.heads:
            self.heads[key] = classifier_head(self.encoder, *key, ranks)
        return self.heads[key]

    def identity(self, dataset: Dataset, settings: Settings) -> Identity:
        return Identity(self.digest, dataset.digest, settings.precision, settings.preprocessing, settings.limit)


def evaluate_dataset(subjects: Sequence[Subject], dataset: Dataset, ranks: Ranks, settings: Settings) -> list[Result]:
    """A result for each model over all ranks, on every rank; the models share one preprocessing.

    `seconds` is the time of the whole pass. A sample that cannot be read is a ConfigError that names it.
    """
    if any(subject.model.preprocess_cfg != subjects[0].model.preprocess_cfg for subject in subjects):
        raise ValueError("models that share a pass must share their preprocessing")
    started = time.perf_counter()
    with torch.inference_mode():
        outcomes = _PASSES[dataset.row.task](subjects, dataset, ranks, settings)
    seconds = round(time.perf_counter() - started, 3)
    return [
        {
            "dataset": dataset.row.key,
            "model": subject.model.name,
            "pretrained": subject.model.pretrained,
            "task": dataset.row.task,
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
    scorers = [subject.scorer(dataset, ranks) for subject in subjects]

    def count_share() -> list[ClassCounts]:
        counts = [ClassCounts.empty(dataset.classes) for _ in subjects]
        for batch, pixels in _queries(subjects[0].model, dataset, ranks, settings):
            for scorer, own in zip(scorers, counts, strict=True):
                own.add(scorer(pixels), batch.labels)
        return counts

    shares = ranks.gather(count_share)
    return [_counted(ClassCounts.total(own), dataset) for own in zip(*shares, strict=True)]


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
            for batch, pixels in _queries(subjects[0].model, dataset, ranks, settings)
        ]

    batches = [batch for share in ranks.gather(embed_share) for batch in share]
    return [
        _recalled(*recall_both_ways(join(own), ranks, settings.device), dataset) for own in zip(*batches, strict=True)
    ]


def _recalled(image_to_text: RecallCounts, text_to_image: RecallCounts, dataset: Dataset) -> dict[str, Any]:
    metrics = retrieval_metrics(image_to_text, text_to_image)
    value = mean_recall(metrics)
    return {
        "metrics": metrics,
        "paper": paper_names(metrics),
        "value": value,
        # The texts of one image are not independent, so they count as one.
        "interval": interval(value, image_to_text.n, len(dataset.data)),
        "chance": retrieval_chance(image_to_text.n),
        "n": image_to_text.n,
        "texts": text_to_image.n,
    }


def _neighbours(
    subjects: Sequence[Subject], dataset: Dataset, ranks: Ranks, settings: Settings
) -> list[dict[str, Any]]:
    """Every rank has all queries and searches its own part of the bank for their neighbours."""
    bank, row = dataset.bank, dataset.row
    assert bank is not None
    limit, size = _share_of_bank(dataset, bank, settings.limit)
    k = min(row.neighbours, size)

    def embed_share() -> list[tuple[Tensor, list[Tensor]]]:
        return [
            (batch.labels, [subject.encoder.images(pixels).cpu() for subject in subjects])
            for batch, pixels in _queries(subjects[0].model, dataset, ranks, settings)
        ]

    def search_share() -> list[Tensor]:
        features = zip(*(own for _, own in queries), strict=True)
        found = [Nearest.of(torch.cat(own), k, settings.device) for own in features]
        for batch, pixels in _batches(subjects[0].model, bank, row, ranks, settings, limit=limit):
            for subject, nearest in zip(subjects, found, strict=True):
                nearest.add(subject.encoder.images(pixels), batch.indices)
        return [nearest.keys.cpu() for nearest in found]

    queries = [batch for share in ranks.gather(embed_share) for batch in share]
    labels, of_bank = torch.cat([own for own, _ in queries]), torch.tensor(bank.labels)
    shares = ranks.gather(search_share)
    outcomes = []
    for own in zip(*shares, strict=True):
        counts = count_votes(merged(own), of_bank, labels, dataset.classes, row.temperature)
        facts = {"bank": size, "neighbours": k, "temperature": row.temperature}
        outcomes.append({**_counted(counts, dataset), **facts})
    return outcomes


def _share_of_bank(dataset: Dataset, bank: EvalSet, limit: int | None) -> tuple[int | None, int]:
    """The limit for the bank and the resulting number of its images: the same share as of the queries.

    A choosing part should be cheap; reported results use the whole bank.
    """
    queries = len(dataset.data if dataset.chosen is None else dataset.chosen)
    if dataset.row.part == "choosing":
        limit, queries = min(limit or queries, queries), len(dataset.data)
    if limit is None or limit >= queries:
        return None, len(bank)
    share = -(-len(bank) * limit // queries)
    return share, share


_PASSES: dict[Task, Callable[[Sequence[Subject], Dataset, Ranks, Settings], list[dict[str, Any]]]] = {
    "zeroshot_classification": _classification,
    "zeroshot_retrieval": _retrieval,
    "knn_classification": _neighbours,
}


def _queries(model: Model, dataset: Dataset, ranks: Ranks, settings: Settings) -> Iterable[tuple[EvalBatch, Tensor]]:
    """The images that the row evaluates."""
    chosen = dataset.chosen
    return _batches(model, dataset.data, dataset.row, ranks, settings, limit=settings.limit, only=chosen)


def _batches(
    model: Model,
    data: EvalSet,
    row: Row,
    ranks: Ranks,
    settings: Settings,
    *,
    limit: int | None,
    only: Sequence[int] | None = None,
) -> Iterable[tuple[EvalBatch, Tensor]]:
    """This rank's contiguous part of the samples with their pixels, without padding or dropping any."""
    config = model.preprocess_cfg
    loader = eval_loader(
        data,
        config,
        batch_size=settings.batch_size,
        rank=ranks.rank,
        world=ranks.size,
        workers=settings.workers,
        preprocessing=settings.preprocessing,
        limit=limit,
        only=only,
        border=row.border,
        resize=row.resize,
        pin=settings.device.type == "cuda",
        pixels=settings.cache,
    )
    reported = ""
    for batch in loader:
        if batch.trouble and batch.trouble != reported:
            reported = batch.trouble
            sys.stderr.write(f"{row.key}: {reported}\n")
        yield batch, normalize(batch.images.to(settings.device), config["mean"], config["std"])
