"""One row of the table on one model: open the data, run the pass that its kind asks for, build the result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.images import Preprocessing, normalize
from pipeline.data.wds_layout import EvalBatch, EvalSet, eval_loader, open_eval_set
from pipeline.evaluation.benchmark import Row
from pipeline.evaluation.encode import Encoder, Precision
from pipeline.evaluation.metrics import (
    ClassCounts,
    classification_chance,
    mean_recall,
    retrieval_chance,
    retrieval_metrics,
)
from pipeline.evaluation.ranks import Ranks
from pipeline.evaluation.results import Identity, Result
from pipeline.evaluation.retrieval import Embeddings, embed_batch, join, recall_both_ways
from pipeline.evaluation.zeroshot import classifier_head, classify
from pipeline.model.clip import Clip

Head = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Settings:
    """How to run; of these only `precision`, `preprocessing` and `limit` may change a result."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 64
    workers: int = 2
    precision: Precision = "fp32"
    preprocessing: Preprocessing = "reference"
    # Take this many samples, evenly spaced over each dataset, for a quick look.
    limit: int | None = None


@dataclass
class Pass:
    """One model going over the table. Classifier heads are kept: many sets share class names and templates."""

    clip: Clip
    encoder: Encoder
    ranks: Ranks
    settings: Settings
    model_digest: str
    heads: dict[Head, Tensor] = field(default_factory=dict)

    def head(self, classnames: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        if (classnames, templates) not in self.heads:
            self.heads[classnames, templates] = classifier_head(self.encoder, classnames, templates, self.ranks)
        return self.heads[classnames, templates]


@dataclass(frozen=True)
class Dataset:
    """A row with its opened directory; the row's class names and templates come before those of the directory."""

    row: Row
    data: EvalSet
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.classnames if self.row.subset is None else self.row.subset)

    @property
    def digest(self) -> str:
        """sha256 over the images, labels and everything else in the row that decides a result."""
        parts = [self.data.digest, self.classnames, self.templates, self.row.subset]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_dataset(row: Row) -> Dataset:
    """Open the directory of a row; what the row asks for and the directory has not is a ConfigError."""
    data = open_eval_set(row.path)
    if (data.kind == "retrieval") != row.is_retrieval:
        raise ConfigError(f"{row.key}: group {row.group!r}, but {row.path} holds a {data.kind} dataset")
    if row.is_retrieval:
        return Dataset(row, data, (), ())
    classnames, templates = row.classnames or data.classnames or (), row.templates or data.templates or ()
    for name, value in (("classnames", classnames), ("templates", templates)):
        if not value:
            raise ConfigError(f"{row.key}: no {name}: neither in its row nor as a file in {row.path}")
    if row.subset is not None and max(row.subset) >= len(classnames):
        raise ConfigError(f"{row.key}: subset names class {max(row.subset)} of {len(classnames)} classes")
    dataset = Dataset(row, data, classnames, templates)
    wrong = next((i for i, label in enumerate(data.labels) if label >= dataset.classes), None)
    if wrong is not None:
        label, name = data.labels[wrong], data.key(wrong)
        raise ConfigError(f"{row.key}: {name} has label {label}, but the row leaves {dataset.classes} classes")
    return dataset


def identity(walk: Pass, dataset: Dataset) -> Identity:
    settings = walk.settings
    return Identity(walk.model_digest, dataset.digest, settings.precision, settings.preprocessing, settings.limit)


def evaluate_dataset(walk: Pass, dataset: Dataset) -> Result:
    """The result of all ranks, on every rank. A sample that cannot be read is a ConfigError that names it."""
    started = time.perf_counter()
    with torch.inference_mode():
        outcome = (_retrieval if dataset.row.is_retrieval else _classification)(walk, dataset)
    return {
        "dataset": dataset.row.key,
        "model": walk.clip.name,
        "pretrained": walk.clip.pretrained,
        "task": "zeroshot_retrieval" if dataset.row.is_retrieval else "zeroshot_classification",
        "language": "en",
        "metrics": outcome.pop("metrics"),
        "metric": dataset.row.metric,
        **outcome,
        "seconds": round(time.perf_counter() - started, 3),
        **asdict(identity(walk, dataset)),
    }


def _classification(walk: Pass, dataset: Dataset) -> Result:
    head = walk.head(dataset.classnames, dataset.templates)
    subset = dataset.row.subset

    def count_share() -> ClassCounts:
        pairs = ((_pixels(walk, batch), batch.labels) for batch in _batches(walk, dataset))
        return classify(walk.encoder, head, pairs, subset)

    counts = ClassCounts.total(walk.ranks.gather(count_share))
    metrics = counts.metrics()
    return {
        "metrics": metrics,
        "value": metrics["acc1"],
        "chance": classification_chance(dataset.classes),
        "n": counts.n,
        "classes": dataset.classes,
        "per_class_recall": counts.per_class_recall(),
        "confusion": counts.sparse_confusion(),
    }


def _retrieval(walk: Pass, dataset: Dataset) -> Result:
    def embed_share() -> list[Embeddings]:
        return [embed_batch(walk.encoder, _pixels(walk, batch), batch.captions) for batch in _batches(walk, dataset)]

    embeddings = join(part for share in walk.ranks.gather(embed_share) for part in share)
    image_to_text, text_to_image = recall_both_ways(embeddings, walk.ranks, walk.settings.device)
    metrics = retrieval_metrics(image_to_text, text_to_image)
    return {
        "metrics": metrics,
        "value": mean_recall(metrics),
        "chance": retrieval_chance(image_to_text.n),
        "n": image_to_text.n,
        "texts": text_to_image.n,
    }


def _batches(walk: Pass, dataset: Dataset) -> Iterable[EvalBatch]:
    """This rank's contiguous part of the samples: nothing padded, nothing dropped."""
    settings = walk.settings
    return eval_loader(
        dataset.data,
        walk.clip.preprocess_cfg,
        batch_size=settings.batch_size,
        rank=walk.ranks.rank,
        world=walk.ranks.size,
        workers=settings.workers,
        preprocessing=settings.preprocessing,
        limit=settings.limit,
        pin=settings.device.type == "cuda",
    )


def _pixels(walk: Pass, batch: EvalBatch) -> Tensor:
    config = walk.clip.preprocess_cfg
    return normalize(batch.images.to(walk.settings.device), config["mean"], config["std"])
