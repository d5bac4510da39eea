"""The model for the registry, made from a run's checkpoint and compared with it before registration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config, ConfigError
from pipeline.data.images import decode, eval_resize, normalize
from pipeline.data.shards.index import load_index
from pipeline.evaluation.measures.encode import Encoder
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.measures.zeroshot import classifier_head
from pipeline.handoff.source import Mismatch, TrainedModel
from pipeline.model.clip import save_open_clip
from pipeline.model.load import Model
from pipeline.model.vit import Vit, save_timm
from pipeline.prompts import caption, resolve_templates
from pipeline.tracking.served.served import Labels, example_image, load_served, predict, save_served

TOLERANCE = 1e-4  # largest difference of an embedding or a score between the run's model and the registered one


def check_labels(
    source: TrainedModel, class_names: Sequence[str] | None, templates: str | Sequence[str] | None
) -> None:
    """Raise ConfigError for classes or templates with a ViT, which has the classes of its classifier."""
    if not isinstance(source.model, Vit):
        return
    for option, given in (("classnames", class_names), ("templates", templates)):
        if given is not None:
            raise ConfigError(
                f"{option}: {source.model.name} predicts only the classes that it was trained on: leave it out"
            )


def labels_of(
    source: TrainedModel, config: Config, class_names: Sequence[str] | None, templates: str | Sequence[str] | None
) -> tuple[Labels | None, list[str]]:
    """The default classes of a CLIP, None for a ViT; and notes about them for the user."""
    if isinstance(source.model, Vit):
        return None, []
    clip, notes = source.model, []
    if class_names is None:
        class_names, why = _trained_classes(source, config)
        if not class_names:
            notes.append(f"the model has no class names of its own ({why}): each request must give them")
    texts = resolve_templates(templates if templates is not None else config.data.templates)
    if not class_names:
        width = int(clip.model_cfg["embed_dim"])
        return Labels([], texts, torch.zeros(0, width)), notes
    encoder = Encoder(clip.model, clip.tokenizer, torch.device("cpu"))
    with torch.inference_mode():
        head = classifier_head(encoder, class_names, texts, Ranks.current())
    return Labels(class_names, texts, head.clone()), notes


def _trained_classes(source: TrainedModel, config: Config) -> tuple[Sequence[str], str]:
    try:
        index = load_index(config.data.train)
    except ConfigError as error:
        return (), str(error).splitlines()[0]
    if index.digest != source.found.state["data_digest"]:
        return (), f"{config.data.train} is no longer what it was trained on"
    return index.classes or (), "it was trained on captions"


def build_served(source: TrainedModel, labels: Labels | None, tags: Mapping[str, str], stage: Path) -> Path:
    """The MLflow model in the temporary directory `stage`; Mismatch unless it agrees with the run's model."""
    model = source.model
    if isinstance(model, Vit):
        weights = save_timm(model, stage / "vit")
    else:
        weights = save_open_clip(
            model.model, model.model_cfg, model.preprocess_cfg, stage / "clip", tokenizer=model.tokenizer
        )
    directory = save_served(stage, weights, labels, tags)
    _compare(model, labels, load_served(directory))
    return directory


def _compare(model: Model, labels: Labels | None, served: Any) -> None:
    """Raise Mismatch unless the registered model agrees with the run's on an image, and on texts or classes."""
    encoder = Encoder(model.model, None if isinstance(model, Vit) else model.tokenizer, torch.device("cpu"))
    picture = example_image(48, 32)  # not square, so that resize and crop matter
    pixels = eval_resize(decode(picture, form="reference"), model.preprocess_cfg)[None]
    pixels = normalize(pixels, model.preprocess_cfg["mean"], model.preprocess_cfg["std"])
    found = [_embeddings(served, "embed_images", {"image": [picture]})]
    with torch.inference_mode():
        wanted = [encoder.images(pixels)]
        if isinstance(model, Vit):
            wanted.append(encoder.scores(pixels).softmax(dim=-1))
            found.append(_scores(served, picture, model.classes or ()))
        if labels is not None:
            texts = [caption(labels.templates[0], name) for name in (*labels.class_names[:4], "something else")]
            wanted.append(encoder.texts(texts))
            found.append(_embeddings(served, "embed_texts", {"text": texts}))
    difference = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    if not difference <= TOLERANCE:
        raise Mismatch(f"the registered model differs from the run's by {difference:.2g}, more than {TOLERANCE:g}")


def _embeddings(served: Any, task: str, columns: Mapping[str, Sequence[Any]]) -> Tensor:
    return torch.tensor([row["embedding"] for row in predict(served, columns, task=task)])


def _scores(served: Any, picture: bytes, classes: Sequence[str]) -> Tensor:
    """(1, K) in the order of `classes`."""
    (row,) = predict(served, {"image": [picture]}, top_k=len(classes))
    scores = dict(zip(row["labels"], row["scores"], strict=True))
    return torch.tensor([[scores[name] for name in classes]])
