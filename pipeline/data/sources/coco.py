"""COCO captions: a json file with ``images`` and ``annotations`` -> samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.data.sources.account import LeftOut
from pipeline.data.sources.sample import Sample, Source, sample_key, unique_keys


def read_coco(path: Path) -> Source:
    """The images of a captions file, each with all its captions.

    Raises:
        ConfigError: For json of another shape.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not json: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: COCO captions need 'images' and 'annotations', found: {found}")
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise ConfigError(f"{path}: an annotation has no 'caption'; give a captions_*.json, not instances_*.json")
        captions.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
    samples, missing = [], []
    for image in content["images"]:
        name = str(image["file_name"])
        file = _coco_image(path, name)
        if file is None or not captions.get(image["id"]):
            missing.append(LeftOut(name, "no such file" if file is None else "no caption"))
            continue
        samples.append(Sample(sample_key(name), name, file, None, tuple(captions[image["id"]])))
    return Source("coco", path, unique_keys(samples), None, missing)


def _coco_image(path: Path, name: str) -> Path | None:
    """Beside the json, in its ``images`` folder, or as COCO has it: ../train2017 for captions_train2017.json."""
    split = path.stem.rpartition("_")[2]
    for folder in (
        path.parent,
        path.parent / "images",
        path.parent.parent / split,
        path.parent.parent / "images" / split,
    ):
        if (folder / name).is_file():
            return folder / name
    return None
