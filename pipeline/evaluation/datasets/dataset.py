"""One row of the table: open and check its data, and choose class names, templates and samples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config import ConfigError
from pipeline.data.classnames import by_plain_name, plain_name
from pipeline.data.eval.wds_layout import TEMPLATES, EvalSet, open_eval_set
from pipeline.data.images import Preprocessing
from pipeline.data.order import seeded_permutation, stable_hash
from pipeline.data.storage.cache import Cache
from pipeline.evaluation.datasets.parts import of_part
from pipeline.evaluation.datasets.rows import Row
from pipeline.evaluation.measures.encode import Precision
from pipeline.prompts import resolve_templates

# For each kind of device: images per forward pass, and the largest number of decoding processes per rank.
DEFAULTS = {"cpu": (64, 2), "cuda": (512, 12)}


def batch_and_workers(device: torch.device, batch_size: int | None, workers: int | None) -> tuple[int, int]:
    """Both as given; defaults for the device replace None."""
    images, most = DEFAULTS.get(device.type, DEFAULTS["cpu"])
    if workers is None:
        # A rank decodes on its share of this host's cores, minus one for itself.
        share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
        workers = most if device.type == "cpu" else max(2, min(most, share))
    return batch_size or images, workers


class OpenSets:
    """Evaluation sets that stay open, so that evaluations which follow each other scan each of them once."""

    def __init__(self) -> None:
        self._sets: dict[tuple[str | Path, str], EvalSet] = {}

    def take(self, location: str | Path, split: str) -> EvalSet:
        """The set, as it was at the first call; ConfigError as `open_eval_set`."""
        if (location, split) not in self._sets:
            self._sets[location, split] = open_eval_set(location, split=split)
        return self._sets[location, split]


@dataclass(frozen=True)
class Settings:
    """How an evaluation runs; only `precision`, `preprocessing` and `limit` may change a result."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 64
    workers: int = 2
    precision: Precision = "fp32"
    preprocessing: Preprocessing = "reference"
    # For a quick look: this many samples, evenly spaced over each dataset, and the same share of a K-NN bank.
    limit: int | None = None
    # Place of decoded images for the next model; None: not kept.
    cache: Cache | None = None
    # None: sets are opened again for each evaluation.
    opened: OpenSets | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Dataset:
    """A row with its opened directory; the row's class names and templates take precedence over the directory's.

    `bank` holds the images among which K-NN searches. K-NN uses no names, so names and templates are then empty.
    """

    row: Row
    data: EvalSet
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    bank: EvalSet | None = None

    @property
    def classes(self) -> int:
        if self.bank is not None:
            return len(self.bank.classnames or ()) or 1 + max(*self.data.labels, *self.bank.labels)
        return len(self.classnames if self.row.subset is None else self.row.subset)

    @property
    def chosen(self) -> Sequence[int] | None:
        """The samples drawn by the row's `sample`, restricted to its `part`, in the order of the set; None: all."""
        row, total = self.row, len(self.data)
        drawn: Sequence[int] = range(total)
        if row.sample is not None and row.sample < total:
            order = seeded_permutation(total, stable_hash("sample", row.seed, row.key))
            drawn = sorted(order[: row.sample].tolist())
        elif row.part == "all":
            return None
        return [drawn[i] for i in of_part(row.part, row.key, [self.data.key(i) for i in drawn])]

    @property
    def digest(self) -> str:
        """sha256 over the images, the labels and everything else that determines a result."""
        row, chosen = self.row, self.chosen
        parts = [self.data.digest, self.classnames, self.templates, row.subset, row.border, row.metric, chosen]
        # Only if the row has them, so that the results of all other rows keep their digests.
        parts += [] if row.resize is None else [row.resize]
        parts += [] if self.bank is None else [[self.bank.digest, row.neighbours, row.temperature]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_dataset(row: Row, opened: OpenSets | None = None) -> Dataset:
    """Open the directory of a row; ConfigError if it lacks something that the row requires.

    opened: takes the set from these, and leaves it there.
    """
    opened = opened or OpenSets()
    data = opened.take(row.path, row.split)
    if (data.kind == "retrieval") != row.is_retrieval:
        raise ConfigError(f"{row.key}: group {row.group!r}, but {row.path} holds a {data.kind} dataset")
    if faults := count_faults(row, data):
        raise ConfigError("\n".join(faults))
    if row.is_retrieval:
        return Dataset(row, data, (), ())
    if row.bank is not None:
        return _with_bank(row, data, row.bank, opened)
    classnames, templates = _names(row, data), row.templates or data.templates or ()
    for name, value in (("classnames", classnames), ("templates", templates)):
        if not value:
            raise ConfigError(f"{row.key}: no {name}: neither in its row nor as a file in {row.path}")
    try:
        resolve_templates(templates)
    except ConfigError as error:
        raise ConfigError(f"{row.key}: {row.path}/{TEMPLATES}: {error}") from None
    if row.subset is not None and (largest := max(max(ids) for ids in row.subset)) >= len(classnames):
        raise ConfigError(f"{row.key}: subset names class {largest} of {len(classnames)} classes")
    dataset = Dataset(row, data, classnames, templates)
    wrong = next((i for i, label in enumerate(data.labels) if label >= dataset.classes), None)
    if wrong is not None:
        label, name = data.labels[wrong], data.key(wrong)
        raise ConfigError(f"{row.key}: {name} has label {label}, but the row leaves {dataset.classes} classes")
    if row.classes is not None and dataset.classes != row.classes:
        raise ConfigError(f"{row.key}: {dataset.classes} class names where {row.classes} classes are expected")
    return dataset


def _with_bank(row: Row, data: EvalSet, split: str, opened: OpenSets) -> Dataset:
    try:
        bank = opened.take(row.path, split)
    except ConfigError as error:
        raise ConfigError(f"{row.key}: its bank: {error}") from error
    if row.bank_images is not None and len(bank) != row.bank_images:
        raise ConfigError(
            f"{row.key}: {len(bank)} images in {row.path}/{split}, its bank, where {row.bank_images} are expected"
        )
    dataset = Dataset(row, data, (), (), bank)
    if row.classes is not None and dataset.classes != row.classes:
        raise ConfigError(f"{row.key}: {dataset.classes} classes where {row.classes} are expected")
    return dataset


def count_faults(row: Row, data: EvalSet) -> list[str]:
    """Counts in a directory that differ from its row, each with its likely cause."""
    found = len(data)
    faults = []
    if row.images is not None and found != row.images:
        fewer = "shards are missing or a download was interrupted" if found < row.images else "another version or split"
        cause = row.known_counts.get(found, f"probably {fewer}")
        faults.append(f"{row.key}: {found} images in {row.path} where {row.images} are expected: {cause}")
    texts = sum(len(each) for each in data.captions)
    if row.texts is not None and texts != row.texts:
        faults.append(f"{row.key}: {texts} captions in {row.path} where {row.texts} are expected")
    shipped = len(data.classnames or ())
    if row.classes is not None and shipped and shipped != row.classes:
        faults.append(f"{row.key}: {shipped} lines in classnames.txt of {row.path} where {row.classes} are expected")
    return faults


def _names(row: Row, data: EvalSet) -> tuple[str, ...]:
    shipped = data.classnames or ()
    if row.spellings is None:
        return row.classnames or shipped
    spelled = by_plain_name(row.spellings, f"{row.key}: spellings")
    by_plain_name(shipped, f"{row.key}: classnames.txt of {row.path}")
    strange = [name for name in shipped if plain_name(name) not in spelled]
    if strange:
        few = ", ".join(repr(name) for name in strange[:3])
        raise ConfigError(f"{row.key}: {few} in classnames.txt of {row.path}: the row's spellings have no such class")
    return tuple(spelled[plain_name(name)] for name in shipped)
