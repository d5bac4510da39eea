"""Ask a registered model about image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.tracking.mlflow.registry import load_registered
from pipeline.tracking.mlflow.uris import resolve_uri
from pipeline.tracking.served.served import predict


def predict_files(
    model_uri: str,
    images: Sequence[str | Path],
    *,
    uri: str | None = None,
    class_names: Sequence[str] | None = None,
    top_k: int = 3,
) -> list[dict[str, Any]]:
    """{"label", "score", "labels", "scores"} for each image, best label first.

    model_uri: models:/NAME@champion, models:/NAME/3 or a directory. uri: the store, as in tracking.uri. A
    request that the model refuses, class names for a ViT or a file that is no image, is a ConfigError.
    """
    model = load_registered(model_uri, resolve_uri(uri, Path("runs")))
    columns = {"image": [Path(image).read_bytes() for image in images]}
    try:
        return predict(model, columns, class_names=list(class_names or ()), top_k=top_k)
    except ValueError as error:
        raise ConfigError(f"{model_uri}: {error}") from error
