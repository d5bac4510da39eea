"""A table of images with captions, classes or both (csv, tsv; FLYP's too) -> samples."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.sources.account import LeftOut
from pipeline.data.sources.folders import class_names
from pipeline.data.sources.sample import Sample, Source, SourceOptions, sample_key, unique_keys

IMAGE_COLUMNS = ("filepath", "image_path", "path", "image", "file", "filename", "file_name", "img", "img_path")
CAPTION_COLUMNS = ("title", "caption", "captions", "text", "sentence", "prompt", "description")
CLASS_COLUMNS = ("class", "classname", "class_name", "label", "category", "cls", "target")


def read_table(path: Path, options: SourceOptions) -> Source:
    """The images that a table names; the rows of one image are its captions.

    Raises:
        ConfigError: For a table without the needed columns, or a row that does not fit them.
    """
    columns, rows = _rows(path)
    image_at = _column(path, columns, options.image_column, IMAGE_COLUMNS, "an image column (--image-column)")
    caption_at = _column(path, columns, options.caption_column, CAPTION_COLUMNS, None)
    class_at = _column(path, columns, options.class_column, CLASS_COLUMNS, None)
    if image_at is None or (caption_at is None and class_at is None):
        known = f"captions: {', '.join(CAPTION_COLUMNS)}; classes: {', '.join(CLASS_COLUMNS)}"
        raise ConfigError(f"{path}: no caption and no class column among {', '.join(columns)} (known names: {known})")
    captions: dict[str, list[str]] = {}
    classes: dict[str, str] = {}
    for line, row in rows:
        if len(row) != len(columns):
            raise ConfigError(
                f"{path}:{line}: {len(row)} fields where the header has {len(columns)} ({', '.join(columns)})"
            )
        name = row[image_at].strip()
        if not name:
            raise ConfigError(f"{path}:{line}: the {columns[image_at]!r} field is empty")
        # FLYP writes a row for each image and template: the rows of one image are its captions.
        mine = captions.setdefault(name, [])
        if caption_at is not None and (text := " ".join(row[caption_at].split())) and text not in mine:
            mine.append(text)
        if class_at is not None and classes.setdefault(name, row[class_at].strip()) != row[class_at].strip():
            raise ConfigError(f"{path}:{line}: {name} has the classes {classes[name]!r} and {row[class_at].strip()!r}")
    folders = sorted(set(classes.values()), key=lambda c: (0, int(c), "") if c.isdecimal() else (1, 0, c))
    label_of = {folder: label for label, folder in enumerate(folders)}
    samples, missing = [], []
    for name, texts in captions.items():
        image = path.parent / name
        if not image.is_file():
            missing.append(LeftOut(name, "no such file"))
            continue
        cls = label_of[classes[name]] if class_at is not None else None
        samples.append(Sample(sample_key(name), name, image, cls, tuple(texts)))
    names = class_names(folders, options.classnames) if class_at is not None else None
    return Source("csv", path, unique_keys(samples), names, missing, folders=folders)


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, fields) of a table; the delimiter is the one the header uses."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max("\t,;|", key=header.count)
        # FLYP's files come from pandas.to_csv(sep="\t"), so quotes mean quoting there too.
        reader = csv.reader(file, delimiter=delimiter)
        rows = [(reader.line_num, row) for row in reader if row]
    if len(rows) < 2:
        raise ConfigError(f"{path}: a header and at least one row are needed, {len(rows)} lines found")
    return [column.strip() for column in rows[0][1]], rows[1:]


def _column(path: Path, columns: list[str], wanted: str | None, known: Sequence[str], need: str | None) -> int | None:
    if wanted is not None:
        if wanted not in columns:
            raise ConfigError(f"{path}: no column {wanted!r}; the columns are {', '.join(columns)}")
        return columns.index(wanted)
    lower = [column.lower() for column in columns]
    for name in known:
        if name in lower:
            return lower.index(name)
    if need is not None:
        raise ConfigError(f"{path}: {need} is needed; the columns are {', '.join(columns)}, known: {', '.join(known)}")
    return None
