"""One row of the benchmark table: a dataset's place, expected content, scoring and group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator

from pipeline.data.storage.remote import is_remote

# source: the dataset of the pretraining, measured by K-NN.
Group = Literal["id", "shift", "zero-shot", "retrieval", "source"]
GROUPS: tuple[Group, ...] = ("id", "shift", "zero-shot", "retrieval", "source")
# How a row is evaluated: texts against images, or images against images.
Task = Literal["zeroshot_classification", "zeroshot_retrieval", "knn_classification"]
# Images of a set that are evaluated: all; those that choose a strength or a checkpoint; all others.
Part = Literal["all", "choosing", "reporting"]
Metric = Literal["acc1", "mean_per_class_recall", "mean_recall"]
# "wds": class names and templates as shipped in the directory, and clip_benchmark's scoring.
Mode = Literal["paper", "wds"]

CLASSIFICATION_METRICS = ("acc1", "acc5", "mean_per_class_recall")
RETRIEVAL_METRICS = tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10))
TOLERANCE = "tolerance"

Count = Annotated[StrictInt, Field(ge=1)]
ClassIds = tuple[Annotated[StrictInt, Field(ge=0)], ...]
Percent = Annotated[float, Field(ge=0, le=100)]


class Row(BaseModel):
    """One dataset. `classnames` and `templates` replace those in the directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The key is the name of the result file, so it must be a plain file name.
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    group: Group
    # A directory, or a URL or hf:ORG/NAME as text.
    path: Path | str
    split: Annotated[str, Field(min_length=1)] = "test"
    # Expected counts of the dataset; others are refused. `texts` are the captions of a retrieval set.
    images: Count | None = None
    classes: Count | None = None
    texts: Count | None = None
    # Likely causes of other numbers of images: {1020: the validation split}.
    known_counts: dict[StrictInt, str] = {}
    # A list, or a text file with one name per line (relative to the YAML file).
    classnames: tuple[str, ...] | None = None
    # Like classnames, but in any order: the directory's names keep their order and get these spellings.
    spellings: tuple[str, ...] | None = None
    # A list of sentences with {c}, or the name of a set in pipeline/prompts.py.
    templates: tuple[str, ...] | None = None
    # Score among these classes of `classnames` only; label j of the dataset is the j-th of them. A class may have
    # several ids and then takes the largest of their logits. In a text file, a line has the ids of a class.
    subset: tuple[ClassIds, ...] | None = None
    # Pixels cropped from each side before the resize.
    border: Annotated[StrictInt, Field(ge=0)] = 0
    # Replaces the model's own resize. squash: to the model's size, whatever the shape of the image; a number of pixels:
    # the shorter side to this length, then a centre crop of the model's size.
    resize: Literal["squash"] | Count | None = None
    # K-NN (knn.py) without class names: the images of this split of the same directory vote for their own class. The
    # split must have `bank_images` images; the most similar `neighbours` of them vote with exp(cosine / temperature).
    bank: Annotated[str, Field(min_length=1)] | None = None
    bank_images: Count | None = None
    neighbours: Count = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07
    # The metric that is shown and averaged: acc1, or mean_recall for retrieval.
    metric: Metric = "acc1"
    in_mean: StrictBool = True
    # Take this many images, drawn by `seed`.
    sample: Count | None = None
    seed: StrictInt = 0
    # Restricts the images further to a part (parts.py).
    part: Part = "all"
    licence: str | None = None
    restriction: str | None = None
    # Results of OpenAI's CLIP ViT-B/16 in percent, and the largest deviation of a correct evaluation:
    # {acc1: 68.3, tolerance: 0.1}.
    published: dict[str, Percent] = {}
    published_wds: dict[str, Percent] = {}
    # The same for other models, by name: {vit_small_patch16_224.dino: {acc1: 87.2, tolerance: 0.3}}.
    published_of: dict[str, dict[str, Percent]] = {}

    @property
    def is_retrieval(self) -> bool:
        return self.group == "retrieval"

    @property
    def task(self) -> Task:
        if self.bank is not None:
            return "knn_classification"
        return "zeroshot_retrieval" if self.is_retrieval else "zeroshot_classification"

    def as_shipped(self) -> Row:
        """The row in mode "wds"."""
        plain = {"classnames": None, "spellings": None, "templates": None, "subset": None, "border": 0, "resize": None}
        return self.model_copy(update={**plain, "published": self.published_wds, "published_of": {}})

    @field_validator("path", mode="before")
    @classmethod
    def _place(cls, path: Any) -> Any:
        return Path(path) if isinstance(path, str) and not is_remote(path) else path

    @field_validator("subset", mode="before")
    @classmethod
    def _ids(cls, subset: Any) -> Any:
        """[3, [5, 7]] and [[3], [5, 7]] mean the same."""
        if not isinstance(subset, list | tuple):
            return subset
        return [[ids] if isinstance(ids, int) else ids for ids in subset]

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_group(cls, values: Any) -> Any:
        group = values.get("group") if isinstance(values, dict) else None
        if group == "retrieval":
            return {"metric": "mean_recall", **values}
        return {"bank": "train", **values} if group == "source" else values

    @model_validator(mode="after")
    def _check(self) -> Row:
        named = self.classnames or self.spellings or self.templates
        if self.is_retrieval and (named or self.subset or self.classes):
            raise ValueError(
                "a retrieval dataset has captions: classes, classnames, spellings, templates and subset do not apply"
            )
        if self.texts is not None and not self.is_retrieval:
            raise ValueError("texts are counted in a retrieval dataset only")
        if (self.metric == "mean_recall") != self.is_retrieval:
            raise ValueError(f"metric {self.metric!r} is none of group {self.group!r}")
        if self.classnames is not None and self.spellings is not None:
            raise ValueError("give classnames (in label order) or spellings (in any order), not both")
        self._check_subset()
        self._check_bank()
        for numbers in (self.published, self.published_wds, *self.published_of.values()):
            _check_published(numbers, RETRIEVAL_METRICS if self.is_retrieval else CLASSIFICATION_METRICS)
        return self

    def _check_bank(self) -> None:
        if self.bank is None:
            if self.group == "source":
                raise ValueError("group 'source' is K-NN: bank should name a split")
            if useless := {"bank_images", "neighbours", "temperature"} & self.model_fields_set:
                raise ValueError(f"{', '.join(sorted(useless))}: for K-NN, which a row with a bank is")
            return
        if self.is_retrieval or self.classnames or self.spellings or self.templates or self.subset:
            raise ValueError(
                "a row with a bank is K-NN: neither retrieval nor classnames, spellings, templates and subset apply"
            )
        if self.bank == self.split:
            raise ValueError(f"bank: every image of {self.split!r} would find itself; name another split")

    def _check_subset(self) -> None:
        if self.subset is None:
            return
        ids = [each for own in self.subset for each in own]
        if not ids or not all(self.subset) or len(set(ids)) < len(ids):
            raise ValueError("subset must hold different class ids, at least one")
        if self.classnames is not None and max(ids) >= len(self.classnames):
            raise ValueError(f"subset names class {max(ids)} of {len(self.classnames)} classnames")
        if self.classes is not None and len(self.subset) != self.classes:
            raise ValueError(f"subset has {len(self.subset)} classes where classes says {self.classes}")


def _check_published(numbers: dict[str, float], metrics: tuple[str, ...]) -> None:
    if not numbers:
        return
    unknown = sorted(set(numbers) - {*metrics, TOLERANCE})
    if unknown or TOLERANCE not in numbers or len(numbers) < 2:
        raise ValueError(f"published should hold some of {', '.join(metrics)}, and tolerance; got {sorted(numbers)}")
