"""Rows that name images, from a table or a JSON file -> samples."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.data.sources.account import LeftOut
from pipeline.data.sources.classes import class_names, class_notes
from pipeline.data.sources.columns import choose_columns, describe_columns
from pipeline.data.sources.places import Found, ImagePlaces
from pipeline.data.sources.sample import Sample, Source, SourceOptions, few, sample_key, unique_keys
from pipeline.prompts import natural_key

# Missing values as written by pandas.
_NOTHING = frozenset(("", "nan", "NaN", "<NA>"))
_HALVES = re.compile("[\ud800-\udfff]")
NO_FILE, NO_CAPTION, NO_CLASS, NO_NAME = "no such file", "no caption", "no class", "no image path"
AMBIGUOUS = "a name that fits more than one image"
MISFIT = "a row that does not fit the columns"


@dataclass(frozen=True)
class Rows:
    """A table in memory.

    Attributes:
        columns: The names of the columns.
        rows: Place of each row in the file (``line 7``), and its values, one for each column.
        misfits: Rows that cannot be read.
        ignored: Kind -> number of images in the file that are not meant for training.
        notes: Notes for the user on how the file was read.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Any]]]
    misfits: Sequence[LeftOut] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass
class _Listed:
    """The content of the rows about one image."""

    captions: list[str] = field(default_factory=list)
    cls: str = ""


def read_rows(path: Path, format: str, table: Rows, options: SourceOptions) -> Source:  # noqa: A002 - as in Source
    """The images named by the rows; several rows of one image are its captions, as in FLYP and Flickr8k.

    Args:
        path: The file, for messages.
        format: Format of the source.
        table: The rows.
        options: The user's options.

    Returns:
        The source. Left out are rows without an image, and images without file, caption or class.

    Raises:
        ConfigError: When columns are missing, for an image of two classes, and when none of the images exists.
    """
    chosen = choose_columns(path, table.columns, options)
    left_out = list(table.misfits)
    images: dict[str, _Listed] = {}
    for place, values in table.rows:
        name = _image_name(values[chosen.image])
        if not name:
            left_out.append(LeftOut(place, NO_NAME))
            continue
        image = images.setdefault(name, _Listed())
        if chosen.caption is not None:
            image.captions += [text for text in texts_of(values[chosen.caption]) if text not in image.captions]
        if chosen.cls is not None and (cls := _label(values[chosen.cls])):
            if image.cls and image.cls != cls:
                raise ConfigError(f"{path}: {place}: {name} has the classes {image.cls!r} and {cls!r}")
            image.cls = cls
    nameless = len(left_out)
    places = ImagePlaces(path, options.image_root)
    found = _find_all(path, list(images), places, options)
    labels = _labels([image.cls for image in images.values() if image.cls])
    folders = sorted(set(labels.values()), key=natural_key)
    number = {folder: label for label, folder in enumerate(folders)}
    samples = []
    for name, image in images.items():
        if (fault := _fault(image, found[name], chosen.caption is not None, chosen.cls is not None)) is not None:
            left_out.append(LeftOut(name, *fault))
        elif (file := found[name].file) is not None:
            cls = number[labels[image.cls]] if chosen.cls is not None else None
            samples.append(Sample(sample_key(name), name, file, cls, tuple(image.captions)))
    classes = class_names(folders, options) if chosen.cls is not None else None
    return Source(
        format,
        path,
        unique_keys(samples),
        classes,
        left_out,
        ignored=table.ignored,
        seen=len(images) + nameless + sum(table.ignored.values()),
        folders=folders if classes is not None else (),
        notes=[
            describe_columns(table.columns, chosen),
            *table.notes,
            *_where(found, places, options),
            *class_notes(classes or ()),
        ],
    )


def texts_of(value: Any) -> list[str]:
    """The captions in a cell: one text, or a list of texts in JSON or Python syntax; each becomes one line."""
    if isinstance(value, str):
        value = _listed_in(value)
    if isinstance(value, dict):
        value = value.get("raw", value.get("caption", value.get("text")))
    if isinstance(value, list):
        return [text for each in value if not isinstance(each, list) for text in texts_of(each)]
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return [] if text in _NOTHING else [text]


def _listed_in(text: str) -> Any:
    """The list that a text represents, otherwise the text."""
    if not re.match(r"""\s*\[\s*["']""", text) or not text.rstrip().endswith("]"):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        # An escaped half of a character cannot be encoded, so such a text is not changed.
        if isinstance(value, list) and all(isinstance(each, str) and not _HALVES.search(each) for each in value):
            return value
    return text


def _image_name(value: Any) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        return ""
    name = str(value).strip() if isinstance(value, str) else str(value)
    return "" if name in _NOTHING else name.removeprefix("./") or name


def _label(value: Any) -> str:
    if isinstance(value, bool | list | dict) or value is None:
        return ""
    text = unicodedata.normalize("NFC", " ".join(str(value).split()))
    return "" if text in _NOTHING else text


def _labels(found: Sequence[str]) -> dict[str, str]:
    """Normalised labels: if all are whole numbers, pandas' 3.0 (in a column with empty fields) becomes 3."""
    whole = {label: re.fullmatch(r"(\d+)(?:\.0+)?", label, re.ASCII) for label in set(found)}
    return {label: match[1] if match and all(whole.values()) else label for label, match in whole.items()}


def _find_all(path: Path, names: Sequence[str], places: ImagePlaces, options: SourceOptions) -> dict[str, Found]:
    found = {name: places.find(name) for name in names}
    # Without their folders a/1.jpg and b/1.jpg are the same name, and one of them would get the other's image.
    files = Counter(each.file for each in found.values() if each.file is not None)
    for name, each in found.items():
        if each.file is not None and each.shortened and files[each.file] > 1:
            found[name] = Found(None, others=(each.file,))
    if names and not any(each.file or each.others for each in found.values()):
        way_out = "" if options.image_root is not None else "; give --image-root DIR"
        raise ConfigError(
            f"{path}: none of its {len(names)} images exists: {few(names, 3)}; looked in {places.looked_in()}{way_out}"
        )
    return found


def _fault(image: _Listed, found: Found, captioned: bool, classed: bool) -> tuple[str, str] | None:
    """Reason and detail for an image that cannot be packed."""
    if found.others:
        first, *more = map(str, found.others)
        if more:
            return AMBIGUOUS, f"its name fits {first} and {more[0]}; give --image-root DIR"
        return AMBIGUOUS, f"its folder does not exist, and without it the name fits {first}, like another name"
    if found.file is None:
        return NO_FILE, ""
    if classed and not image.cls:
        return NO_CLASS, ""
    if captioned and not classed and not image.captions:
        return NO_CAPTION, ""
    return None


def _where(found: dict[str, Found], places: ImagePlaces, options: SourceOptions) -> list[str]:
    bases = Counter(str(each.base) for each in found.values() if each.file is not None)
    notes = [f"images: {', '.join(f'{count} in {base}' for base, count in bases.most_common(3))}"] if bases else []
    if any(each.file is None and not each.others for each in found.values()):
        way_out = "" if options.image_root is not None else "; others can be given by --image-root DIR"
        notes.append(f"missing images were looked for in {places.looked_in()}{way_out}")
    return notes
