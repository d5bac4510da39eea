"""Items to embed: images of a folder, a table, shards or a list of paths, and texts of a file, a table or a list."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.config.text_file import lines_of, read_text
from pipeline.data.shards.foreign import read_shards
from pipeline.data.sources.columns import COLUMNS
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import ImageFile, SourceOptions
from pipeline.data.sources.walk import printable, walk

STDIN = "-"
_TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Item:
    """One item to embed: an image file, or a text. `key`: its name for the user."""

    key: str
    content: ImageFile | str


def images_of(source: str, options: SourceOptions) -> list[Item]:
    """The images of a source in a stable order.

    Args:
        source: folder (every image below it), table or JSON file, folder of shards or tars, or "-": one path per line.
        options: how a table is read.

    Raises:
        ConfigError: there is no such source, or no image in it.
    """
    path = Path(source)
    if source == STDIN:
        items = [Item(line, Path(line)) for line in _stdin()]
    elif (path / "index.json").is_file():
        items = [Item(sample.name, sample.image) for sample in read_shards(path).samples]
    elif path.is_dir() and options.format == "auto" and not any(path.glob("*.tar")):
        # every image below it, so a folder without classes and captions is also a source
        items = [Item(printable(name), path / name) for name in walk(path).images]
    else:
        items = [Item(sample.name, sample.image) for sample in read_source(source, options).samples]
    return _some(items, source, "image")


def texts_of(source: str, options: SourceOptions) -> list[Item]:
    """The texts of a source in its order; each is its own key.

    Args:
        source: text file with one per line, csv or tsv with a column of them, shards or any other source with captions,
            or "-": standard input, one per line.
        options: caption_column names the column.

    Raises:
        ConfigError: there is no such source, or no text in it.
    """
    path = Path(source)
    if source == STDIN:
        texts = _stdin()
    elif path.suffix.lower() in (".txt", ".text") and path.is_file():
        texts = [line.strip() for line in lines_of(read_text(path, options.encoding))]
    elif path.suffix.lower() in _TABLES and path.is_file():
        texts = _column(path, options)
    else:
        found = read_shards(path) if (path / "index.json").is_file() else read_source(source, options)
        texts = [caption for sample in found.samples for caption in sample.captions]
    return _some([Item(text, text) for text in texts if text.strip()], source, "text")


def _column(path: Path, options: SourceOptions) -> list[str]:
    import csv
    import io

    rows = csv.DictReader(io.StringIO(read_text(path, options.encoding)), delimiter=_TABLES[path.suffix.lower()])
    names = rows.fieldnames or ()
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in names}
    column = options.caption_column or next((plain[each] for each in COLUMNS["caption"] if each in plain), None)
    if column not in names:
        raise ConfigError(
            f"{path}: no column {column or 'of texts'}; name one of {', '.join(names)} with --caption-column"
        )
    return [(row[column] or "").strip() for row in rows]


def _stdin() -> list[str]:
    return [line for line in (each.rstrip("\r\n") for each in sys.stdin) if line.strip()]


def _some(items: Sequence[Item], source: str, what: str) -> list[Item]:
    if not items:
        raise ConfigError(f"{source}: there is no {what} in it")
    return list(items)
