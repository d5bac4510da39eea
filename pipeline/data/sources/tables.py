"""A table of images with captions, classes or both (csv, tsv; FLYP's, Flickr8k's and Flickr30k's) -> samples."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.config.text_file import lines_of, read_text
from pipeline.data.sources.account import LeftOut
from pipeline.data.sources.columns import is_known
from pipeline.data.sources.listed import MISFIT, Rows, read_rows
from pipeline.data.sources.places import looks_like_an_image
from pipeline.data.sources.sample import Source, SourceOptions, few

_DELIMITERS = "\t,;|"
# Flickr8k.token.txt and results_20130124.token: "1000.jpg#0<TAB>A child …", without a header.
_TOKEN = re.compile(r"(.+\.\w+)#\d+")
# A quoted field of a csv: from one quote to another, with quotes inside it doubled.
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')

# (number of its first line, its fields)
Fields = tuple[int, list[str]]


def read_table(path: Path, options: SourceOptions) -> Source:
    """The images named by a table; several rows of one image are its captions.

    Raises:
        ConfigError: For a table with missing columns, and if quotes may have swallowed lines.
    """
    return read_rows(path, "csv", table_rows(path, options), options)


def table_rows(path: Path, options: SourceOptions) -> Rows:
    """The header and the rows of a table. The delimiter comes from the header, or from ``sep=``.

    Raises:
        ConfigError: When the table is empty, has no header, or its quotes do not match.
    """
    text = read_text(path, options.encoding, option=True)
    lines = lines_of(text)
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    named = re.fullmatch(r"\s*sep=(.)\s*", lines[first]) if first < len(lines) else None
    if named is not None:  # Excel's
        first += 1
    if first >= len(lines) or not lines[first].strip():
        raise ConfigError(f"{path}: a header and at least one row are needed, nothing found")
    delimiter = named[1] if named is not None else _delimiter(lines[first])
    fields = _fields(path, lines[first:], first + 1, delimiter, options.quotes)
    header = next(fields)
    columns, rows, notes = _header(path, header, options)
    token = _TOKEN.fullmatch(header[1][0])
    listed: list[tuple[str, list[str]]] = []
    misfits: list[LeftOut] = []
    for number, row in [*rows, *fields]:
        cells = [_TOKEN.sub(r"\1", row[0]), *row[1:]] if token else [*row]
        while len(cells) > len(columns) and not cells[-1]:
            cells.pop()
        if not any(cells):
            continue
        if len(cells) != len(columns):
            what = f"{len(cells)} fields where the header has {len(columns)} ({few(columns, 10)})"
            misfits.append(LeftOut(f"line {number}", MISFIT, what))
        else:
            listed.append((f"line {number}", cells))
    if not listed and not misfits:
        raise ConfigError(f"{path}: a header and at least one row are needed, only a header found")
    if delimiter == "\t" and options.quotes == "auto":
        listed, more = _as_quoted(listed)
        notes += more
    return Rows(columns, listed, misfits, notes=notes)


def _delimiter(header: str) -> str:
    """The delimiter with the most columns of known names, otherwise with the most columns."""

    def score(delimiter: str) -> tuple[int, int]:
        cells = [cell.strip().strip('"') for cell in header.split(delimiter)]
        return sum(map(is_known, cells)) if len(cells) > 1 else 0, len(cells)

    return max(_DELIMITERS, key=score)


def _fields(path: Path, lines: Sequence[str], start: int, delimiter: str, quotes: str) -> Iterator[Fields]:
    """The rows, by line or as csv with quotes."""
    if quotes == "csv" or (quotes == "auto" and delimiter != "\t"):
        yield from _csv_fields(path, lines, start, delimiter, checked=quotes == "auto")
        return
    width = None
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        row = [cell.strip() for cell in line.split(delimiter)]
        width = width or len(row)
        if quotes == "auto" and len(row) != width and any(cell.startswith('"') for cell in row):
            raise ConfigError(
                f"{path}:{number}: {len(row)} fields where the header has {width}, and a quote: either quotes are "
                "letters here, and a field is missing, or a quoted field holds a tab or runs over the line; give "
                "--quotes none for the first, --quotes csv for the second"
            )
        yield number, row


def _csv_fields(path: Path, lines: Sequence[str], start: int, delimiter: str, *, checked: bool) -> Iterator[Fields]:
    """Rows in csv syntax. ``checked``: a field over several lines must not contain lines that look like rows."""
    way_out = "close the quote or double it inside quotes, or give --quotes none if quotes are ordinary characters"
    file = io.StringIO("\n".join(lines))
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    done = 0
    while True:
        number = start + done
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            limit = csv.field_size_limit()
            why = f"with a field of over {limit:,} characters" if "field limit" in str(error) else f"as csv: {error}"
            raise ConfigError(f"{path}:{number}: a row begins here that cannot be read {why}; {way_out}") from None
        done = reader.line_num
        if checked:
            swallowed = next((line for cell in row for line in cell.split("\n")[1:] if _is_row(line, delimiter)), None)
            if swallowed is not None:
                raise ConfigError(
                    f"{path}:{number}: a quoted field runs from here to line {start + done - 1} and holds other rows "
                    f"({swallowed.strip()[:60]!r}); {way_out} (or --quotes csv where this is meant)"
                )
        if row:
            yield number, [cell.strip() for cell in row]


def _is_row(line: str, delimiter: str) -> bool:
    """Whether a line inside a field names an image file, as rows do."""
    return any(looks_like_an_image(word.strip("\"'")) for word in re.split(rf"[\s{re.escape(delimiter)}]+", line))


def _header(path: Path, first: Fields, options: SourceOptions) -> tuple[list[str], list[Fields], list[str]]:
    """The columns, the rows in the first line, and notes. A table without header has numbered columns."""
    number, cells = first
    if _TOKEN.fullmatch(cells[0]) and len(cells) == 2:
        return ["image", "caption"], [first], ["the table has no header and is read as Flickr's: image#number, caption"]
    if not any(map(looks_like_an_image, cells)):
        return [*cells], [], []
    counted = [str(place) for place in range(1, len(cells) + 1)]
    if not {options.image_column, options.caption_column, options.class_column} & set(counted):
        shown = next(cell for cell in cells if looks_like_an_image(cell))
        raise ConfigError(
            f"{path}:{number}: no header, for its first line holds {shown!r}; put a line with the names of the columns "
            "before it, as in path,caption, or count them: --image-column 1 --caption-column 2 (or --class-column 2)"
        )
    return counted, [first], ["the table has no header; its columns are counted from 1"]


def _as_quoted(rows: list[tuple[str, list[str]]]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The fields of a tsv without quotes that its writer added, and notes for the user.

    Writers quote all fields of a column, or fields with a quote, which they double. Other quotes are ordinary
    characters.
    """
    width = len(rows[0][1]) if rows else 0
    all_quoted = [all(_QUOTED.fullmatch(cells[place]) for _, cells in rows) for place in range(width)]
    rest = [cell for _, cells in rows for cell, quoted in zip(cells, all_quoted, strict=True) if not quoted]
    opening = [cell for cell in rest if cell.startswith('"')]
    matches = [_QUOTED.fullmatch(cell) for cell in opening]
    minimal = bool(opening) and all(match is not None and '"' in match[1] for match in matches)
    notes = [f"{len(opening)} fields that begin with a quote are read as written"] if opening and not minimal else []
    if not minimal and not any(all_quoted):
        return rows, notes

    def cell_of(place: int, cell: str) -> str:
        match = _QUOTED.fullmatch(cell) if minimal or all_quoted[place] else None
        return cell if match is None else match[1].replace('""', '"')

    return [(at, [cell_of(place, cell) for place, cell in enumerate(cells)]) for at, cells in rows], notes
