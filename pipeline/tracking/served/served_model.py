"""The model that the registry holds: a fine-tuned CLIP or ViT behind MLflow's `predict`.

MLflow copies this file next to the weights and runs it wherever the model is loaded, so it imports nothing from this
package. The artifacts of a CLIP are `clip`, an open_clip directory, and `labels`, a directory with labels.json (class
names and templates) and labels.safetensors (their unit vectors). The artifact of a ViT is `vit`, a timm directory,
which names the classes of its classifier.

    input    a table with one of the columns
               image  bytes of an image file (base64 in JSON)
               path   of an image file that the process may read; refused by a server
               text   for embed_texts; of a CLIP
    params   task: classify | embed_images | embed_texts; class_names, templates: instead of a CLIP's own; top_k
    output   classify: label, score, and labels, scores (best first, top_k of them; they add up to 1 over all classes,
             but for a SigLIP, which judges each class on its own); embed_*: embedding
"""

from __future__ import annotations

import base64
import io
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.pyfunc import PythonModel
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

BATCH = 64  # images or texts per forward
PLACEHOLDER = "{c}"
# Limits of one request to a server, because other requests wait for it.
MAX_ROWS, MAX_TEXTS, MAX_SERVED_PIXELS = 1024, 2**17, 2**26
# Characters of one text; a context of 77 tokens holds a few hundred.
MAX_TEXT = 10_000
# Images of more pixels are decoded one at a time, so that their memory does not add up.
LARGE = 2**25
# Vectors of class names are kept for later requests, up to these numbers of lists and of values in all of them.
HEADS, HEAD_NUMBERS = 64, 2**25
# The limits of training and evaluation (pipeline/data/image_files.py).
MAX_PIXELS, MAX_RATIO = 2**28, 400
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# Exceptions of Pillow's plugins and base64 for damaged input.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError)

# Pillow's own limit is below this module's, which is checked before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


class BadRequest(MlflowException, ValueError):
    """A malformed request: a server answers 400 with the reason and without a traceback."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)


class Served(PythonModel):
    """The model in fp32 in eval mode, on the GPU if there is one."""

    def load_context(self, context: Any) -> None:
        """Read the artifacts, without downloading or unpickling anything."""
        artifacts = {name: Path(path) for name, path in context.artifacts.items()}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vit = artifacts.get("vit")
        self.kind = ServedClip(**artifacts, device=device) if vit is None else ServedVit(vit, device)
        # Requests are decoded in parallel and computed in turn, so only one batch at a time has activations.
        self.turn = threading.Lock()

    def predict(self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> Any:  # noqa: ARG002
        """One row of the answer per row of the table; a BadRequest (a ValueError) names the fault."""
        tasks = {"classify": self._classify, "embed_images": self._embed_images, "embed_texts": self._embed_texts}
        options = {"task": "classify", "class_names": [], "templates": [], "top_k": 5} | dict(params or {})
        if options["task"] not in tasks:
            raise BadRequest(f"task={options['task']!r}: expected one of {', '.join(tasks)}")
        if serving() and len(model_input) > MAX_ROWS:
            raise BadRequest(f"{len(model_input)} rows, more than the {MAX_ROWS} that one request may have")
        with torch.inference_mode():
            return tasks[options["task"]](model_input, options)

    def _classify(self, table: pd.DataFrame, options: Mapping[str, Any]) -> pd.DataFrame:
        wanted = ([str(each) for each in options[name]] for name in ("class_names", "templates"))
        with self.turn:
            names, logits = self.kind.classifier(*wanted)
        top_k = int(options["top_k"])
        if top_k < 1:
            raise BadRequest(f"top_k={top_k}: should be at least 1")
        scores = self.kind.scores(self._images(table, logits, len(names)))
        best = scores.topk(min(top_k, len(names)), dim=-1)
        labels = [[names[index] for index in row] for row in best.indices.tolist()]
        values = best.values.tolist()
        return pd.DataFrame(
            {
                "label": [row[0] for row in labels],
                "score": [row[0] for row in values],
                "labels": labels,
                "scores": values,
            }
        )

    def _embed_images(self, table: pd.DataFrame, options: Mapping[str, Any]) -> pd.DataFrame:  # noqa: ARG002
        return pd.DataFrame({"embedding": self._images(table, self.kind.images, 0).tolist()})

    def _embed_texts(self, table: pd.DataFrame, options: Mapping[str, Any]) -> pd.DataFrame:  # noqa: ARG002
        if isinstance(self.kind, ServedVit):
            raise BadRequest("task='embed_texts': this model reads no texts")
        if "text" not in table:
            raise BadRequest(f"embed_texts needs a column text, got {', '.join(map(str, table.columns))}")
        with self.turn:
            vectors = self.kind.texts([str(text) for text in table["text"]])
        return pd.DataFrame({"embedding": vectors.tolist()})

    def _images(self, table: pd.DataFrame, compute: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """Results of `compute` for the table's images, decoded a batch at a time, on the CPU; (0, width) for none."""
        column = next((name for name in ("image", "path") if name in table), None)
        if column is None:
            raise BadRequest(f"images come in a column image or path, got {', '.join(map(str, table.columns))}")
        if column == "path" and serving():
            # it would reveal to clients which files the server has
            raise BadRequest("path: a server reads no files; send the image itself in the column image")
        read = _decode if column == "image" else Path
        values = list(table[column])
        parts = []
        for start in range(0, len(values), BATCH):
            part = enumerate(values[start : start + BATCH], start)
            pixels = torch.stack([self.kind.transform(_rgb(row, read, value)) for row, value in part])
            with self.turn:
                parts.append(compute(pixels.to(self.kind.device)).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, width)


def serving() -> bool:
    """Whether this process serves requests."""
    return os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true"


class ServedClip:
    """Compares images with texts of classes: the model's own classes, or those of a request."""

    def __init__(self, clip: Path, labels: Path, device: torch.device) -> None:
        import open_clip

        name = f"local-dir:{clip}"
        self.device = device
        loaded: Any = open_clip.create_model_from_pretrained(name, device=device)
        self.model, self.transform = loaded[0].eval(), loaded[1]
        self.tokenizer = open_clip.get_tokenizer(name)
        known = json.loads((labels / "labels.json").read_text(encoding="utf-8"))
        self.class_names: list[str] = known["class_names"]
        self.templates: list[str] = known["templates"]
        self.head = load_file(labels / "labels.safetensors")["head"].to(device)
        self.heads: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = OrderedDict()

    def images(self, pixels: Tensor) -> Tensor:
        """(N, D) unit vectors."""
        return normalize(self.model.encode_image(pixels).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) unit vectors."""
        if serving() and (long := next((text for text in texts if len(text) > MAX_TEXT), None)):
            raise BadRequest(f"a text of {len(long)} characters, more than {MAX_TEXT}: {long[:40]!r}, …")
        parts = [self.tokenizer(list(texts[i : i + BATCH])).to(self.device) for i in range(0, len(texts), BATCH)]
        parts = [normalize(self.model.encode_text(tokens).float(), dim=-1) for tokens in parts]
        return torch.cat(parts) if parts else self.head.new_zeros(0, self.head.shape[1])

    def classifier(self, names: list[str], templates: list[str]) -> tuple[list[str], Callable[[Tensor], Tensor]]:
        """The K names, from the request or else the model's own, and a function from pixels to logits (N, K)."""
        names, head = self._head(names, templates)
        scale, bias = self.model.logit_scale.exp(), 0.0 if self.model.logit_bias is None else self.model.logit_bias
        return names, lambda pixels: scale * self.images(pixels) @ head.T + bias

    def scores(self, logits: Tensor) -> Tensor:
        """Shares of the classes; for a SigLIP the probability of each class on its own, as it was trained."""
        return logits.softmax(dim=-1) if self.model.logit_bias is None else logits.sigmoid()

    def _head(self, names: list[str], templates: list[str]) -> tuple[list[str], Tensor]:
        """Names, and their (K, D) unit vectors."""
        if not names and not templates and self.class_names:
            return self.class_names, self.head
        names, templates = names or self.class_names, templates or self.templates
        if not names:
            raise BadRequest("class_names: the model has none of its own; give a list of names in the params")
        if wrong := [template for template in templates if PLACEHOLDER not in template]:
            raise BadRequest(f"templates: {wrong[0]!r} has no {PLACEHOLDER} for the class name")
        if serving() and len(names) * len(templates) > MAX_TEXTS:
            raise BadRequest(f"class_names, templates: {len(names)} x {len(templates)} texts, more than {MAX_TEXTS}")
        return names, self._kept_head(tuple(names), tuple(templates))

    def _kept_head(self, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """The (K, D) unit vectors, computed once for a list of names; the most recently used lists are kept."""
        key = names, templates
        if key not in self.heads:
            texts = [template.replace(PLACEHOLDER, name) for name in names for template in templates]
            means = self.texts(texts).view(len(names), len(templates), -1).mean(dim=1)
            self.heads[key] = normalize(means, dim=-1)
        self.heads.move_to_end(key)
        while len(self.heads) > 1 and (len(self.heads) > HEADS or self._numbers() > HEAD_NUMBERS):
            self.heads.popitem(last=False)
        return self.heads[key]

    def _numbers(self) -> int:
        return sum(head.numel() for head in self.heads.values())


class ServedVit:
    """A model with only the classes of its own classifier."""

    def __init__(self, vit: Path, device: torch.device) -> None:
        import timm
        from timm.data import create_transform, resolve_model_data_config

        self.device = device
        self.model: Any = timm.create_model(f"local-dir:{vit}", pretrained=True).to(device).eval()
        self.transform: Any = create_transform(**resolve_model_data_config(self.model))
        self.class_names: list[str] = json.loads((vit / "config.json").read_text(encoding="utf-8"))["label_names"]

    def images(self, pixels: Tensor) -> Tensor:
        """(N, D) unit vectors."""
        features = self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        return normalize(features.float(), dim=-1)

    def classifier(self, names: list[str], templates: list[str]) -> tuple[list[str], Callable[[Tensor], Tensor]]:
        """The K names, and a function from pixels to logits (N, K)."""
        for option, given in (("class_names", names), ("templates", templates)):
            if given:
                known = ", ".join(self.class_names[:5]) + (", .." if len(self.class_names) > 5 else "")
                raise BadRequest(
                    f"{option}: this model knows the classes that it was trained on and no others: {known}"
                )
        return self.class_names, self.model

    def scores(self, logits: Tensor) -> Tensor:
        """Shares of the classes."""
        return logits.softmax(dim=-1)


def _rgb(row: int, read: Any, value: Any) -> Image.Image:
    """An upright RGB image, read as in the evaluation."""
    try:
        with Image.open(read(value)) as image:
            sides = sorted(image.size)
            most = MAX_SERVED_PIXELS if serving() else MAX_PIXELS
            if sides[0] * sides[1] > most or sides[1] > MAX_RATIO * sides[0]:
                raise ValueError(f"{image.width} x {image.height} pixels are too many, or too long a line")
            if image.mode == "F":
                raise ValueError("floating point pixels have no agreed range; save it with 8 or 16 bit")
            with _ONE_LARGE if sides[0] * sides[1] > LARGE else nullcontext():
                return _upright_rgb(image)
    except UNREADABLE as error:
        raise BadRequest(f"row {row}: no readable image ({type(error).__name__}: {str(error)[:200]})") from error


_ONE_LARGE = threading.Lock()


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in DEEP_MODES:  # convert("RGB") would cut these off at 255
        deep = np.asarray(upright).astype(np.float64)
        top = 255 if upright.mode == "I" and deep.max(initial=0) <= 255 else 65535
        upright = Image.fromarray(np.clip(np.rint(deep * (255 / top)), 0, 255).astype(np.uint8))
    return upright.convert("RGB")


def _decode(value: Any) -> io.BytesIO:
    """The bytes of an image file, also as base64 text."""
    return io.BytesIO(base64.b64decode(value, validate=True) if isinstance(value, str) else bytes(value))


mlflow.models.set_model(Served())
