"""Text files: tables, class names, templates, JSON and captions all become strings here.

A byte order mark names the encoding and is dropped; anything else must be UTF-8, or in the encoding that the caller
passes on from the user. Other content is refused with file, line and byte.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from pipeline.config.errors import ConfigError

# UTF-32's mark begins with UTF-16's, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAVE = "save the file as UTF-8"
# str.splitlines also ends a line at form feeds and at U+0085 and U+2028, which are characters of a caption.
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_text(path: str | Path, encoding: str | None = None, *, option: bool = False) -> str:
    """The text of a file, without byte order mark; line ends stay as they are.

    Args:
        path: The file.
        encoding: The encoding that the user names; None: UTF-8.
        option: Whether the user can give an encoding (``--encoding``), which the message then offers.

    Returns:
        The decoded text.

    Raises:
        ConfigError: When the file cannot be read or is not text in this encoding.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{str(path)!r}: no file has such a name ({error})") from None
    return decode_text(data, str(path), encoding, option=option)


def decode_text(data: bytes, name: str, encoding: str | None = None, *, option: bool = False) -> str:
    """The text in ``data``, which messages call ``name``; otherwise like `read_text`."""
    mark, marked = next(((mark, marked) for mark, marked in _MARKS if data.startswith(mark)), (b"", None))
    wanted = marked or encoding or "utf-8"
    data = data[len(mark) :]
    other = f"{_SAVE}, or give its encoding, as in --encoding cp1252" if option else _SAVE
    try:
        text = data.decode(wanted)
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(data[: error.start].decode(wanted, "replace"))) + 1
        byte = f"byte 0x{data[error.start]:02x}" if error.start < len(data) else "its end"
        what = f"{byte} (number {len(mark) + error.start + 1} of the file) is not {wanted.upper()}"
        raise ConfigError(f"{name}:{line}: {what}; {other}") from None
    except (LookupError, UnicodeError) as error:
        raise ConfigError(f"--encoding: {encoding!r} is not an encoding of text ({error})") from None
    if "\0" in text:
        line = len(_LINE_END.findall(text[: text.index("\0")])) + 1
        raise ConfigError(f"{name}:{line}: a NUL character, so this is not {wanted.upper()} text; {other}")
    return text.removeprefix("\ufeff")


def read_json(path: str | Path, encoding: str | None = None, *, option: bool = False) -> Any:
    """The value in a JSON file, decoded by `read_text`.

    Raises:
        ConfigError: When the file cannot be read, is not JSON, or holds text that cannot be encoded.
    """
    return parse_json(read_text(path, encoding, option=option), str(path))


def parse_json(text: str, name: str) -> Any:
    """The value in ``text``, which messages call ``name``. Raises ConfigError with line and column."""
    try:
        value = json.loads(text)
        # "\ud800" is valid JSON but half a character, which cannot be encoded.
        text if "\\u" not in text else json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}: not json: {error.msg} (column {error.colno})") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(f"{name}: not text: {half!r} is half of a character") from None
    except (RecursionError, ValueError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{name}: not json that can be read: {why}") from None
    return value


def lines_of(text: str) -> list[str]:
    """The lines of a text without their ends, without an empty last one."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines
