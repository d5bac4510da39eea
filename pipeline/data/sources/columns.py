"""Columns of a table, or keys of a JSON list, and their roles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.sources.sample import SourceOptions, few

# Common names of columns; of several in a table the first here is used. Case, spaces and hyphens do not matter.
COLUMNS = {
    "image": [
        "filepath",
        "file_path",
        "image_path",
        "img_path",
        "path",
        "image",
        "image_file",
        "file",
        "filename",
        "file_name",
        "image_name",
        "img_name",
        "img",
        "photo",
        "picture",
        "jpg",
        "image_id",
        "imageid",
        "img_id",
        "id",
    ],
    "caption": [
        "title",
        "caption",
        "captions",
        "text",
        "sentence",
        "sentences",
        "comment",
        "prompt",
        "description",
        "raw",
        "caption_text",
        "alt_text",
        "alt",
        "txt",
    ],
    "class": [
        "class",
        "classname",
        "class_name",
        "label",
        "labels",
        "label_name",
        "category",
        "category_name",
        "cls",
        "target",
        "breed",
        "species",
        "y",
    ],
}


@dataclass(frozen=True)
class Columns:
    """Positions of the columns that are read; captions, classes or both."""

    image: int
    caption: int | None
    cls: int | None


def is_known(column: str) -> bool:
    """Whether the role of a column is known from its name."""
    return any(_plain(column) in names for names in COLUMNS.values())


def choose_columns(path: Path, columns: Sequence[str], options: SourceOptions) -> Columns:
    """The columns to read: those named by options, otherwise those with known names.

    Raises:
        ConfigError: When an option names a missing column, or there is no column of images, or none about them.
    """
    image = _place(path, columns, "image", options.image_column)
    caption = _place(path, columns, "caption", options.caption_column)
    cls = _place(path, columns, "class", options.class_column)
    if image is None:
        raise ConfigError(
            f"{path}: no column is known to hold images; the columns are {few(columns, 20)}; give --image-column NAME "
            f"(known: {', '.join(COLUMNS['image'])})"
        )
    if caption is None and cls is None:
        known = f"captions: {', '.join(COLUMNS['caption'])}; classes: {', '.join(COLUMNS['class'])}"
        raise ConfigError(
            f"{path}: no caption and no class column among {few(columns, 20)}; give --caption-column or --class-column "
            f"(known names: {known})"
        )
    return Columns(image, caption, cls)


def describe_columns(columns: Sequence[str], chosen: Columns) -> str:
    """One sentence: the role of each column, and the unused ones."""
    roles = (("images", chosen.image), ("captions", chosen.caption), ("classes", chosen.cls))
    taken = [f"{role} from {columns[place]!r}" for role, place in roles if place is not None]
    used = {place for _, place in roles}
    unused = [column or "(no name)" for place, column in enumerate(columns) if place not in used]
    return f"columns: {', '.join(taken)}" + (f"; not used: {few(unused, 10)}" if unused else "")


def _place(path: Path, columns: Sequence[str], role: str, wanted: str | None) -> int | None:
    if wanted is not None:
        found = [place for place, column in enumerate(columns) if column == wanted] or [
            place for place, column in enumerate(columns) if _plain(column) == _plain(wanted)
        ]
        if not found:
            raise ConfigError(f"{path}: no column {wanted!r} (--{role}-column); the columns are {few(columns, 20)}")
        return found[0]
    plain = [_plain(column) for column in columns]
    return next((plain.index(name) for name in COLUMNS[role] if name in plain), None)


def _plain(column: str) -> str:
    return re.sub(r"[\s_-]+", "_", column.strip().lower())
