"""Folders of small images that tables and json files can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., list[Path]]:
    """images("a/1.jpg", "b.png") -> these files below ``tmp_path``, each of another colour."""

    def make(*names: str) -> list[Path]:
        files = [tmp_path / name for name in names]
        for number, file in enumerate(files):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (20 * number % 256, 90, 30)).save(file)
        return files

    return make


@pytest.fixture
def ten(images: Callable[..., Sequence[Path]]) -> list[str]:
    """Ten images ``0.jpg`` … ``9.jpg`` in ``images/``, by their names there."""
    names = [f"{number}.jpg" for number in range(10)]
    images(*(f"images/{name}" for name in names))
    return names
