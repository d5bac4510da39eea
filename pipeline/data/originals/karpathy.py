"""COCO and Flickr30k in Karpathy's split: images with all their captions, unchanged."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.data.sources.account import LeftOut
from pipeline.data.sources.sample import Sample, Source, sample_key

# (path of the image below an entry of `images`, its captions)
Entry = tuple[str, list[str]]


@dataclass(frozen=True)
class Karpathy:
    """Reads the test split from the first of ``lists`` that exists. ``images``: possible folders of the images."""

    lists: tuple[str, ...]
    images: tuple[str, ...]

    def __call__(self, root: Path) -> Source:
        """Raises ConfigError without a list, or if it is not one of Karpathy's."""
        file = next((root / name for name in self.lists if (root / name).is_file()), None)
        if file is None:
            raise ConfigError(f"{root}: none of {', '.join(self.lists)} is there")
        try:
            entries = list(_READERS[file.suffix](file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}: not Karpathy's list ({type(error).__name__}: {error})") from error
        samples, missing = [], []
        for name, captions in entries:
            image = self._find(root, name)
            if image is None:
                missing.append(LeftOut(name, "no such file"))
            else:
                samples.append(Sample(sample_key(name), name, image, None, tuple(captions)))
        return Source("karpathy", root, samples, None, missing)

    def _find(self, root: Path, name: str) -> Path | None:
        """Look with the folder in the list ("val2014/..") and without it."""
        names = (name, Path(name).name)
        candidates = (root / place / below for place in self.images for below in names)
        return next((path for path in candidates if path.is_file()), None)


def _from_json(file: Path) -> Iterator[Entry]:
    """dataset_coco.json, dataset_flickr30k.json."""
    for image in json.loads(file.read_text(encoding="utf-8"))["images"]:
        if image["split"] == "test":
            folder = image.get("filepath")
            name = f"{folder}/{image['filename']}" if folder else image["filename"]
            yield name, [sentence["raw"] for sentence in image["sentences"]]


def _from_csv(file: Path) -> Iterator[Entry]:
    """flickr_annotations_30k.csv: columns raw (a json list), split, filename."""
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["split"] == "test":
                yield row["filename"], _texts(json.loads(row["raw"]))


def _from_txt(file: Path) -> Iterator[Entry]:
    """flickr30k_test_karpathy.txt: a header, then a line "1234.jpg,A caption" for each caption, commas included."""
    captions: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        if line.strip():
            name, text = line.strip().split(".jpg,", 1)
            captions.setdefault(f"{name}.jpg", []).append(text)
    return iter(captions.items())


def _texts(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"captions should be a list of sentences, got {found!r}")
    return found


_READERS = {".json": _from_json, ".csv": _from_csv, ".txt": _from_txt}
