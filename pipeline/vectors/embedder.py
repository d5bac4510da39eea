"""Embedding models: a run, an export, a registered version, or a plain model by its name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.images import decode, eval_resize, normalize
from pipeline.evaluation.command import find_device, load_plain
from pipeline.evaluation.measures.encode import Encoder
from pipeline.model.load import Model, load_model
from pipeline.model.onnx.run import OnnxModel
from pipeline.model.restore import check_exists, load_run
from pipeline.model.text import batch_tokenizer
from pipeline.model.vit import Vit
from pipeline.model.weights import stock_state, weights_digest
from pipeline.runs.run import is_run
from pipeline.tracking.mlflow.registry import registered_files
from pipeline.tracking.mlflow.uris import resolve_uri

_EXPORT, _REGISTERED = "selora.json", ("models:/", "runs:/")


@dataclass(frozen=True)
class Embedder:
    """Images and texts to unit vectors.

    Attributes:
        name: the user's name of the model, with a path made absolute.
        digest: sha256 of its weights; vectors can be compared only if it is the same.
        encoder: the model on its device.
        preprocess_cfg: the resize and normalization of its images.
    """

    name: str
    digest: str
    encoder: Encoder
    preprocess_cfg: dict[str, Any]

    def pixels(self, file: bytes) -> Tensor:
        """The bytes of an image file -> uint8 (3, H, W). Raises BadImageError."""
        return eval_resize(decode(file, form="reference"), self.preprocess_cfg)

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, D) fp32 unit vectors on the CPU."""
        cfg = self.preprocess_cfg
        with torch.inference_mode():
            return self.encoder.images(normalize(pixels.to(self.encoder.device), cfg["mean"], cfg["std"])).cpu()

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, D) fp32 unit vectors on the CPU. Raises ConfigError for a model that reads no texts."""
        if self.encoder.tokenizer is None:
            raise ConfigError(f"{self.name}: reads no texts, so it embeds images only")
        with torch.inference_mode():
            return self.encoder.texts(texts).cpu()


def load_embedder(
    name: str, *, pretrained: str | None = None, uri: str | None = None, device: str | None = None
) -> Embedder:
    """Load an embedding model.

    Args:
        name: directory of a run or of an export (open_clip, timm, onnx), ``models:/NAME@ALIAS``, or as model.name.
        pretrained: open_clip tag or weights file of a plain model.
        uri: the store of ``models:/``; None: MLFLOW_TRACKING_URI, or runs/mlflow.db.
        device: None: a GPU if there is one.

    Raises:
        ConfigError: there is no such model, or it has a format that cannot be read here.
    """
    where = find_device(device)
    if name.startswith(_REGISTERED):
        return _of(name, _registered(name, resolve_uri(uri, Path("runs"))), where)
    check_exists(name)
    folder = Path(name)
    shown = str(folder.absolute()) if folder.is_dir() else name
    if is_run(folder):
        return _of(shown, load_run(folder), where)
    if (folder / _EXPORT).is_file():
        return _of_export(shown, folder, where)
    return _of(shown, load_plain(name, pretrained), where)


def _registered(name: str, uri: str) -> Model:
    with tempfile.TemporaryDirectory(prefix="selora-") as folder:
        files = registered_files(name, uri, Path(folder)) / "artifacts"
        if (files / "vit").is_dir():
            return load_model(f"timm:local-dir:{files / 'vit'}")
        if (files / "clip").is_dir():
            return load_plain(str(files / "clip"), None)
    raise ConfigError(f"{name}: was not registered by `selora promote`, so its weights cannot be read here")


def _of(name: str, model: Model, device: torch.device) -> Embedder:
    digest = weights_digest(stock_state(model.model))
    module = model.model.to(device).eval()
    tokenizer = None if isinstance(model, Vit) else batch_tokenizer(module, model.tokenizer)
    return Embedder(name, digest, Encoder(module, tokenizer, device), dict(model.preprocess_cfg))


def _of_export(name: str, folder: Path, device: torch.device) -> Embedder:
    facts = json.loads((folder / _EXPORT).read_text(encoding="utf-8"))
    to = facts["to"]
    if to == "timm":
        return _of(name, load_model(f"timm:local-dir:{folder}"), device)
    if to in ("onnx", "triton"):
        return _of_graphs(name, folder, facts)
    if to == "peft":
        raise ConfigError(f"{folder}: an adapter cannot embed; use the run, or export it merged (--to open_clip)")
    return _of(name, load_model(f"local-dir:{folder}"), device)


def _of_graphs(name: str, folder: Path, facts: dict[str, Any]) -> Embedder:
    """Graphs run by onnxruntime; their weights are those of the run, rounded, so their digest names the precision."""
    cfg = facts["graphs"]["preprocess_cfg"]
    files = {key: folder / file for key, file in facts["graphs"]["files"].items()}
    model = OnnxModel(files, cfg["mean"], cfg["std"])
    # the file of a Hugging Face tokenizer does not describe how open_clip cleans and pads
    ours = model.context is not None and facts["graphs"].get("hf_tokenizer") is None
    tokenizer = _graph_tokenizer(folder, model) if ours else None
    digest = f"{facts['weights_digest']}-{facts['graphs']['precision']}"
    return Embedder(name, digest, Encoder(cast(Any, model), tokenizer, torch.device("cpu")), cfg)


def _graph_tokenizer(folder: Path, model: OnnxModel) -> Any:
    from tokenizers import Tokenizer

    read, context = Tokenizer.from_file(str(folder / "tokenizer.json")), int(cast(int, model.context))
    read.enable_truncation(context)

    def tokenize(texts: list[str]) -> Tensor:
        tokens = torch.zeros(len(texts), context, dtype=torch.int64)
        for row, found in enumerate(read.encode_batch(texts)):
            tokens[row, : len(found.ids)] = torch.tensor(found.ids)
        return tokens

    return tokenize
