"""The nearest vectors of a file to a text or an image, exactly: every vector is compared."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.image_files import IMAGE_EXTENSIONS
from pipeline.data.images import BadImageError
from pipeline.vectors.embedder import Embedder
from pipeline.vectors.store import Vectors

_AT_ONCE = 2**18  # vectors compared at once


class Hit(NamedTuple):
    """A key, and the cosine of its vector with that of the query."""

    key: str
    cosine: float


def search(found: Vectors, embedder: Embedder, question: str, top: int = 10) -> list[Hit]:
    """The `top` vectors nearest to a question, best first.

    Args:
        found: the vectors.
        embedder: the model that they were computed with.
        question: the name of an image file, or a text.
        top: number of results.

    Raises:
        ConfigError: the vectors belong to other weights, or the image cannot be read.
    """
    if embedder.digest != found.digest:
        raise ConfigError(
            f"{embedder.name} has the weights {embedder.digest[:12]}, and the vectors were computed with "
            f"{found.digest[:12]}: embed again, or name the model with --with"
        )
    values, places = nearest(found.vectors, _vector(embedder, question), min(top, len(found.keys)))
    return [Hit(found.keys[int(place)], float(value)) for value, place in zip(values, places, strict=True)]


def nearest(vectors: Tensor, question: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices of the `top` of (N, D) unit vectors that are nearest to one (D,); ties by index."""
    cosines = torch.cat([part @ question for part in vectors.split(_AT_ONCE)])
    places = cosines.argsort(descending=True, stable=True)[:top]
    return cosines[places], places


def is_image(question: str) -> bool:
    """Whether a question is the name of an image file, which need not exist."""
    return Path(question).suffix[1:].lower() in IMAGE_EXTENSIONS or Path(question).is_file()


def _vector(embedder: Embedder, question: str) -> Tensor:
    if not is_image(question):
        return embedder.texts([question])[0]
    try:
        return embedder.images(embedder.pixels(Path(question).read_bytes())[None])[0]
    except (BadImageError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{question}: {reason}") from error
