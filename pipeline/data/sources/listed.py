"""Rows that name images, from a table or a json file -> samples."""

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

# How pandas writes what is not there.
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
        rows: Where each row is in the file (``line 7``), and its values, as many as there are columns.
        misfits: Rows that cannot be read.
        ignored: Kind -> number of images that are in the file and not meant for training.
        notes: What the user should know about how the file was read.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Any]]]
    misfits: Sequence[LeftOut] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass
class _Listed:
    """What the rows say about one image."""

    captions: list[str] = field(default_factory=list)
    cls: str = ""


def read_rows(path: Path, format: str, table: Rows, options: SourceOptions) -> Source:  # noqa: A002 - as in Source
    """The images that the rows name; the rows of one image are its captions, as FLYP and Flickr8k write them.

    Args:
        path: The file, which messages call by its name.
        format: What the source is then called.
        table: The rows.
        options: The user's.

    Returns:
        The source. What is left out: rows without image, images without file, without caption or without class.

    Raises:
        ConfigError: Without the needed columns, for an image of two classes, and when none of the images is there.
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
    """The captions in a cell: one text, or a list of them as json or as Python prints it; each becomes one line."""
    if isinstance(value, str):
        value = _listed_in(value)
    if isinstance(value, dict):
        value = value.get("raw", value.get("caption", value.get("text")))
    if isinstance(value, list):
        return [text for each in value if not isinstance(each, list) for text in texts_of(each)]
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return [] if text in _NOTHING else [text]


def _listed_in(text: str) -> Any:
    """The list that a text spells out, else the text."""
    if not re.match(r"""\s*\[\s*["']""", text) or not text.rstrip().endswith("]"):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        # Half a character in an escape can be written nowhere, so such a text stays as it is.
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
    """Normalised labels: if all are whole numbers, the 3.0 that pandas writes in a column with empty fields is 3."""
    whole = {label: re.fullmatch(r"(\d+)(?:\.0+)?", label, re.ASCII) for label in set(found)}
    return {label: match[1] if match and all(whole.values()) else label for label, match in whole.items()}


def _find_all(path: Path, names: Sequence[str], places: ImagePlaces, options: SourceOptions) -> dict[str, Found]:
    found = {name: places.find(name) for name in names}
    # Without their folders a/1.jpg and b/1.jpg are one name, and one of the two would get the other's image.
    files = Counter(each.file for each in found.values() if each.file is not None)
    for name, each in found.items():
        if each.file is not None and each.shortened and files[each.file] > 1:
            found[name] = Found(None, others=(each.file,))
    if names and not any(each.file or each.others for each in found.values()):
        way_out = "" if options.image_root is not None else "; give --image-root DIR"
        raise ConfigError(
            f"{path}: none of its {len(names)} images is there: {few(names, 3)}; looked in {places.looked_in()}"
            f"{way_out}"
        )
    return found


def _fault(image: _Listed, found: Found, captioned: bool, classed: bool) -> tuple[str, str] | None:
    """Reason and detail for what cannot be packed."""
    if found.others:
        first, *more = map(str, found.others)
        if more:
            return AMBIGUOUS, f"its name fits {first} and {more[0]}; give --image-root DIR"
        return AMBIGUOUS, f"its folder is not there, and without it the name fits {first}, as another one does"
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
