"""ObjectNet when unpacked: 313 class folders of png files, of which 113 correspond to classes of ImageNet."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.originals.imagenet import class_samples, subfolders
from pipeline.data.sources.sample import Source

_PLACES = ("", "images", "objectnet-1.0/images")
_LABELS, _OVERLAP = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


def read_objectnet(root: Path) -> Source:
    """The images of the overlap with ImageNet, including their borders.

    Labels are positions in the sorted folder names of the overlap, as in FLYP, clip_benchmark and the public set; names
    are ObjectNet's own in lower case.
    Raises ConfigError if the mappings or a class folder are missing.
    """
    label_file, overlap_file = _mapping(root, _LABELS), _mapping(root, _OVERLAP)
    name_of: dict[str, str] = json.loads(label_file.read_text(encoding="utf-8"))
    overlap = json.loads(overlap_file.read_text(encoding="utf-8"))
    chosen = sorted(folder for folder, name in name_of.items() if name in overlap)
    images = next((root / place for place in _PLACES if (root / place / chosen[0]).is_dir()), None)
    if images is None:
        raise ConfigError(f"{root}: no folder {chosen[0]} in {', '.join(str(root / place) for place in _PLACES)}")
    there = set(subfolders(images))
    missing = sorted(set(name_of) - there)
    if missing:
        raise ConfigError(
            f"{images}: {len(there & set(name_of))} of {len(name_of)} class folders are there, without "
            f"{', '.join(missing[:5])}: ObjectNet was downloaded or unpacked in part; unzip all of objectnet-1.0.zip"
        )
    names = [name_of[folder].lower() for folder in chosen]
    return Source("objectnet", root, list(class_samples(images, chosen)), names)


def _mapping(root: Path, name: str) -> Path:
    for place in ("", "mappings", "objectnet-1.0/mappings", "../mappings"):
        if (root / place / name).is_file():
            return root / place / name
    raise ConfigError(f"{root}: no mappings/{name}; it is part of objectnet-1.0.zip")
