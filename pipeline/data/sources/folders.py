"""A folder of class folders -> samples."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.image_files import IMAGE_EXTENSIONS
from pipeline.data.sources.sample import Sample, Source, SourceOptions, sample_key, unique_keys
from pipeline.prompts import read_classnames, readable_name


def read_folders(root: Path, options: SourceOptions) -> Source:
    """The images of ``root/CLASS/…``, sorted by name; classes are the folders directly below ``root``.

    Raises:
        ConfigError: For a class folder without an image, or class names that do not fit.
    """
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    samples: list[Sample] = []
    ignored: Counter[str] = Counter()
    for label, folder in enumerate(folders):
        before = len(samples)
        for directory, below, files in os.walk(root / folder, followlinks=True):
            below.sort()
            for file in sorted(files):
                path = Path(directory) / file
                if not _is_image(path):
                    ignored["files that are no images by their names"] += not file.startswith(".")
                    continue
                name = path.relative_to(root).as_posix()
                samples.append(Sample(sample_key(name), name, path, label))
        if len(samples) == before:
            raise ConfigError(f"{root / folder}: the class folder holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    names = class_names(folders, options.classnames)
    return Source("imagefolder", root, unique_keys(samples), names, ignored=ignored, folders=folders)


def class_names(folders: Sequence[str], classnames: str | Path | None) -> list[str]:
    """Readable names of class folders or labels, from a file or by the look of them.

    Raises:
        ConfigError: When two classes have the same name, or a name is missing.
    """
    names = read_classnames(classnames, folders) if classnames else [readable_name(folder) for folder in folders]
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"classes: {count} classes read {name!r}; give a classnames file that tells them apart")
    return names


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
