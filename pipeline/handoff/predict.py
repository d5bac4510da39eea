"""Predictions of a registered model for image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.data.images import BadImageError, decode
from pipeline.tracking.mlflow.registry import load_registered
from pipeline.tracking.mlflow.uris import resolve_uri
from pipeline.tracking.served.served import predict

# Bad images that a message names.
SHOWN = 20


def predict_files(
    model_uri: str,
    images: Sequence[str | Path],
    *,
    uri: str | None = None,
    class_names: Sequence[str] | None = None,
    top_k: int = 3,
) -> list[dict[str, Any]]:
    """Predict the best labels of each image.

    Args:
        model_uri: ``models:/NAME@champion``, ``models:/NAME/3`` or a directory.
        images: Image files, under the same limits as in packing.
        uri: The store, as in tracking.uri.
        class_names: Class names instead of the model's own; not for a ViT.
        top_k: Number of labels per image.

    Returns:
        For each image, in order, label, score, labels and scores, best label first; or ``error`` with the reason why it
        cannot be read.

    Raises:
        ConfigError: When none of the images can be read, or the model refuses the request.
    """
    faults = [_fault(Path(image)) for image in images]
    if images and all(faults):
        named = [f"{image}: {fault}" for image, fault in zip(images, faults, strict=True)]
        raise ConfigError("\n".join(named[:SHOWN] + ([f"and {len(named) - SHOWN} more"] if named[SHOWN:] else [])))
    model = load_registered(model_uri, resolve_uri(uri, Path("runs")))
    columns = {"image": [Path(image).read_bytes() for image, fault in zip(images, faults, strict=True) if not fault]}
    try:
        rows = iter(predict(model, columns, class_names=list(class_names or ()), top_k=top_k))
    except ValueError as error:
        raise ConfigError(f"{model_uri}: {error}") from error
    return [{"error": fault} if fault else next(rows) for fault in faults]


def _fault(image: Path) -> str:
    """Why an image cannot be read, in the words of pack; empty if it can."""
    try:
        decode(image.read_bytes(), form="reference")
    except BadImageError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return ""
