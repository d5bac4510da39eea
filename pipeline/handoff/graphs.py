"""ONNX and Triton exports: written, run by onnxruntime over images and texts, and compared with the run's model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.images import normalize
from pipeline.data.reference.texts import reference_texts
from pipeline.evaluation.datasets.benchmark import Benchmark
from pipeline.evaluation.datasets.dataset import Settings, open_dataset
from pipeline.evaluation.measures.encode import Encoder
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.passes import Subject, evaluate_dataset
from pipeline.handoff import triton
from pipeline.handoff.source import Mismatch
from pipeline.model.export import CAPTIONS, write_onnx
from pipeline.model.load import Model
from pipeline.model.onnx.run import OnnxModel
from pipeline.model.onnx.write import HEAD, IMAGE, TEXT, Pixels, Precision
from pipeline.model.vit import Vit
from pipeline.tracking.served.served import Labels

FILES = {"onnx": {name: f"{name}.onnx" for name in (IMAGE, TEXT, HEAD)}, "triton": triton.FILES}
CLASSES_FILE = "labels.json"
CHECKED = 64  # number of images, and of texts


class Limit(NamedTuple):
    """Requirements of a graph: the least cosine of a vector with the model's, and the largest error of a logit.

    If `scaled`, the error is in units of the logit scale, which is that of a cosine.
    """

    cosine: float
    logit: float
    scaled: bool


# The scale of a trained CLIP is 100, and a product in half precision has 11 bits.
LIMITS: dict[Precision, Limit] = {
    "fp32": Limit(0.9999, 1e-3, False),
    "fp16": Limit(0.9999, 5e-3, True),
    "int8": Limit(0.9, 0.1, True),
}


@dataclass(frozen=True)
class GraphOptions:
    """Options of an ONNX or Triton export.

    Attributes:
        precision: fp32, fp16, or int8: weights in 8 bits, whose loss is measured on `benchmark`.
        pixels: "uint8" if the graph normalizes images, "normalized" if the caller does.
        labels: the classes of the head; None: without a head, or for a ViT's classifier.
        benchmark: the benchmark for int8.
        settings: settings of its evaluation.
        say: called with a line for each dataset.
    """

    precision: Precision = "fp32"
    pixels: Pixels = "uint8"
    labels: Labels | None = None
    benchmark: Benchmark | None = None
    settings: Settings = field(default_factory=Settings)
    say: Callable[[str], None] | None = None


class Agreement(NamedTuple):
    """Comparison of graphs with the model: the least cosine, the largest error of a logit and the tolerance."""

    cosine: float
    difference: float
    tolerance: float
    notes: list[str]


def write_graph_export(model: Model, to: str, directory: Path, options: GraphOptions) -> list[str]:
    """Write the graphs of a merged model and their companion files. Returns notes for the user."""
    labels = options.labels
    head = None if labels is None or not len(labels.class_names) else labels.head
    files = _files(to, directory)
    write_onnx(model, directory, files, precision=options.precision, pixels=options.pixels, classes=head)
    names = list(model.classes or ()) if isinstance(model, Vit) else [] if labels is None else list(labels.class_names)
    known = {"class_names": names} | ({} if labels is None else {"templates": list(labels.templates)})
    (directory / CLASSES_FILE).write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if to == "triton":
        triton.write_repository(directory, open_graphs(model, to, directory), names)
    notes = [] if isinstance(model, Vit) or head is not None else ["no class names: no zero-shot head is written"]
    return [*notes, f"{options.precision}, pixels {options.pixels}"]


def graph_facts(model: Model, to: str, options: GraphOptions) -> dict[str, Any]:
    """Facts for selora.json, from which selora can run the graphs again."""
    cfg = {name: list(value) if isinstance(value, tuple) else value for name, value in model.preprocess_cfg.items()}
    facts = {"precision": options.precision, "pixels": options.pixels, "files": FILES[to], "preprocess_cfg": cfg}
    return facts | {"hf_tokenizer": hf_tokenizer(model)}


def hf_tokenizer(model: Model) -> str | None:
    """The Hugging Face tokenizer of a CLIP, for which open_clip cleans and pads texts; None: CLIP's own."""
    return None if isinstance(model, Vit) else model.model_cfg["text_cfg"].get("hf_tokenizer_name")


def open_graphs(model: Model, to: str, directory: Path) -> OnnxModel:
    """The graphs of an export, for a model's own pixels and tokens."""
    return OnnxModel(_files(to, directory), model.preprocess_cfg["mean"], model.preprocess_cfg["std"])


def compare_graphs(model: Model, to: str, directory: Path, options: GraphOptions) -> Agreement:
    """Run the graphs over 64 images and 64 texts; Mismatch if they do not reproduce the model."""
    graphs = open_graphs(model, to, directory)
    images, limit = check_images(model), LIMITS[options.precision]
    notes = []
    stock: Any = model.model
    with torch.inference_mode():
        vectors = {"image": (_unit(stock.encode_image, images), graphs.encode_image(images))}
        if isinstance(model, Vit):
            scale, pairs = 1.0, [(stock(images), graphs(images))]
        else:
            tokens = model.tokenizer(check_texts())
            vectors["text"] = _unit(stock.encode_text, tokens), graphs.encode_text(tokens)
            scale, bias = float(stock.logit_scale.exp()), getattr(stock, "logit_bias", None)
            add = 0.0 if bias is None else float(bias)
            (image, image_), (text, text_) = vectors["image"], vectors["text"]
            pairs = [(scale * image @ text.T + add, scale * image_ @ text_.T + add)]
            if HEAD in graphs.sessions and options.labels is not None:
                pairs.append((scale * image @ options.labels.head.T + add, graphs(images)))
            if hf_tokenizer(model) is None:
                _check_tokenizer(directory / "tokenizer.json", model)
            else:
                notes.append(f"texts are tokenized as open_clip's HFTokenizer of {hf_tokenizer(model)} does")
    cosine = min(float((own * other).sum(-1).min()) for own, other in vectors.values())
    difference = max(float((own - other).abs().max()) for own, other in pairs)
    tolerance = limit.logit * (scale if limit.scaled else 1.0)
    if not (cosine >= limit.cosine and difference <= tolerance):
        raise Mismatch(
            f"onnxruntime gives cosines of {cosine:.6f} (at least {limit.cosine}) and logits that differ by "
            f"{difference:.2g} ({tolerance:.2g} allowed) from the run's model"
        )
    # if the model itself is undecided, rounding decides
    if options.precision != "int8" and any(_other_first(own, other, 2 * tolerance) for own, other in pairs):
        raise Mismatch("onnxruntime gives another text or class first than the run's model")
    agreed = sum(int((own.argmax(-1) == other.argmax(-1)).sum()) for own, other in pairs)
    notes.append(
        f"{CHECKED} images and texts: least cosine {cosine:.6f}, same first answer in {agreed} of "
        f"{sum(len(own) for own, _ in pairs)}"
    )
    return Agreement(cosine, difference, tolerance, notes)


def measure_loss(model: Model, to: str, directory: Path, options: GraphOptions) -> list[dict[str, Any]]:
    """Dataset by dataset of the benchmark, the metric of the model (`before`) and of its graphs (`after`)."""
    assert options.benchmark is not None
    say = options.say or (lambda _: None)
    own = Subject.of(model, options.settings)
    graphs: Any = open_graphs(model, to, directory)
    theirs = Subject(model, Encoder(graphs, own.encoder.tokenizer, torch.device("cpu")), "graphs")
    rows = []
    for row in options.benchmark.rows:
        dataset = open_dataset(row)
        if own.unable(dataset) is not None:
            continue
        before, after = evaluate_dataset([own, theirs], dataset, Ranks(), options.settings)
        found = {"dataset": row.key, "metric": row.metric, "before": before["value"], "after": after["value"]}
        rows.append(found | {"n": before["n"]})
        say(f"{row.key}: {row.metric} {100 * before['value']:.2f} in fp32, {100 * after['value']:.2f} in 8 bits")
    if not rows:
        raise ConfigError(f"benchmark {options.benchmark.name}: the model cannot be evaluated on any of its rows")
    return rows


def check_images(model: Model) -> Tensor:
    """(64, 3, H, W) seeded pictures, each a field of a few colours under some noise, normalized for the model."""
    size = model.preprocess_cfg["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    fields = F.interpolate(torch.rand(CHECKED, 3, 4, 4, generator=generator), sides, mode="bilinear")
    noise = 0.2 * (torch.rand(CHECKED, 3, *sides, generator=generator) - 0.5)
    pixels = ((fields + noise).clamp(0, 1) * 255).to(torch.uint8)
    return normalize(pixels, model.preprocess_cfg["mean"], model.preprocess_cfg["std"])


def check_texts() -> list[str]:
    """64 sentences about everyday things."""
    texts = reference_texts("general")
    return [*CAPTIONS, *texts[:: len(texts) // CHECKED]][:CHECKED]


def _check_tokenizer(file: Path, model: Any) -> None:
    """Check that tokenizer.json reads the texts like the model's own tokenizer."""
    from tokenizers import Tokenizer

    theirs, texts = Tokenizer.from_file(str(file)), check_texts()
    for text, wanted in zip(texts, model.tokenizer(texts).tolist(), strict=True):
        found = theirs.encode(text).ids
        if found != wanted[: len(found)]:  # each pads in its own way after the end of the text
            raise Mismatch(f"{file.name} reads {text!r} as {found}, the run's tokenizer as {wanted}")


def _files(to: str, directory: Path) -> dict[str, Path]:
    return {name: directory / file for name, file in FILES[to].items()}


def _unit(encode: Any, inputs: Tensor) -> Tensor:
    return F.normalize(encode(inputs).float(), dim=-1)


def _other_first(own: Tensor, other: Tensor, margin: float) -> bool:
    """Whether a row has another largest entry, by more than the margin in `own`."""
    best = own.max(-1).values
    taken = own.gather(-1, other.argmax(-1, keepdim=True)).squeeze(-1)
    return bool((best - taken > margin).any())
