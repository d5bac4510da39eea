"""The MLflow model directory of a fine-tuned model: written, checked and loaded here, before a server gets it."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from pipeline.tracking.mlflow.store import LOG_LEVELS

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

CODE = Path(__file__).with_name("served_model.py")
REQUIRED = ("pandas", "pillow", "safetensors", "torch", "torchvision")  # plus open_clip_torch or timm
MODEL_ENVIRONMENT = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # otherwise the uv.lock and pyproject.toml of the working directory go into the model
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_LOG_UV_FILES": "false",
}


@dataclass(frozen=True)
class Labels:
    """The classes of a served CLIP by default: names, caption templates and a (K, D) unit vector for each name."""

    class_names: Sequence[str]
    templates: Sequence[str]
    head: Tensor


def save_served(stage: Path, weights: Path, labels: Labels | None, facts: Mapping[str, Any]) -> Path:
    """Write the MLflow model STAGE/model around an open_clip or timm directory; `facts` becomes its metadata.

    weights: the directory. labels: labels of a CLIP; None for a timm directory, whose classifier has its own. Returns
    the model's directory. `stage` should be a temporary directory. The model contains no path of this machine.
    """
    import mlflow

    artifacts = {"vit": weights}
    if labels is not None:
        artifacts = {"clip": weights, "labels": _write_labels(stage / "labels", labels)}
    code = Path(shutil.copy(CODE, stage / "served_model.py"))
    model = stage / "model"
    with quiet():
        mlflow.pyfunc.save_model(
            path=str(model),
            python_model=str(code),
            artifacts={name: str(path) for name, path in artifacts.items()},
            signature=signature(reads_texts=labels is not None),
            input_example=_table({"image": [example_image()]}),
            pip_requirements=requirements(weights),
            metadata=dict(facts),
        )
    _drop_paths(model)
    return model


def load_served(model: Path | str) -> Any:
    """Load the model as MLflow does, with unpickling forbidden; `.predict(table, params=)`."""
    import mlflow

    with quiet():
        return mlflow.pyfunc.load_model(str(model))


def signature(*, reads_texts: bool) -> ModelSignature:
    """Inputs and outputs of the model; all columns are optional, because each task has its own.

    A ViT declares the params of a CLIP so that it can refuse those without effect; MLflow would drop them silently.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, ParamSchema, ParamSpec, Schema

    def columns(**types: Any) -> Schema:
        return Schema([ColSpec(kind, name, required=False) for name, kind in types.items()])

    return ModelSignature(
        columns(image="binary", path="string", **({"text": "string"} if reads_texts else {})),
        columns(
            label="string", score="double", labels=Array("string"), scores=Array("double"), embedding=Array("double")
        ),
        ParamSchema(
            [
                ParamSpec("task", "string", "classify"),
                ParamSpec("class_names", "string", [], (-1,)),
                ParamSpec("templates", "string", [], (-1,)),
                ParamSpec("top_k", "long", 5),
            ]
        ),
    )


def requirements(weights: Path) -> list[str]:
    """The requirements of the model, in the versions that it was checked with; MLflow adds itself."""
    names = sorted({*REQUIRED, *_libraries(weights)})
    # no index has a version 2.15.0+cu130
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]


def _libraries(weights: Path) -> list[str]:
    """The libraries that read the directory."""
    file = weights / "open_clip_config.json"
    if not file.is_file():
        return ["timm"]
    config = json.loads(file.read_text(encoding="utf-8"))
    return ["open_clip_torch", *(["transformers"] if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name") else [])]


def example_image(width: int = 32, height: int = 32) -> bytes:
    """A PNG of a colour gradient."""
    from PIL import Image

    pixels = bytes(value for y in range(height) for x in range(width) for value in (8 * x % 256, 8 * y % 256, 96))
    out = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(out, "PNG")
    return out.getvalue()


def predict(model: Any, columns: Mapping[str, Sequence[Any]], **params: Any) -> list[dict[str, Any]]:
    """The rows of the model's answer to a table, given as columns."""
    answer = model.predict(_table(columns), params=params)
    return answer.to_dict(orient="records")


def _table(columns: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({name: list(values) for name, values in columns.items()})


def _write_labels(directory: Path, labels: Labels) -> Path:
    directory.mkdir()
    known = {"class_names": list(labels.class_names), "templates": list(labels.templates)}
    (directory / "labels.json").write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "labels.safetensors").write_bytes(save({"head": labels.head.cpu().contiguous()}))
    return directory


def _drop_paths(model: Path) -> None:
    """Remove the paths of the staged parts; MLflow reads only their names in the model."""
    import yaml

    file = model / "MLmodel"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    flavor = content["flavors"]["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    for cache in model.rglob("__pycache__"):
        shutil.rmtree(cache)


@contextmanager
def quiet() -> Iterator[None]:
    """Run MLflow without its progress bars and messages, and with unpickling forbidden."""
    before = {name: os.environ.get(name) for name in MODEL_ENVIRONMENT}
    levels = {name: logging.getLogger(name).level for name in LOG_LEVELS}
    os.environ.update(MODEL_ENVIRONMENT)
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
