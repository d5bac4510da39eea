"""Text files are read correctly, or refused with file, line, byte and way out."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.config.text_file import decode_text, lines_of, parse_json, read_json, read_text


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_a_byte_order_mark_is_obeyed_and_dropped(tmp_path: Path, mark: bytes, encoding: str) -> None:
    (tmp_path / "t.txt").write_bytes(mark + "caf\u00e9\r\nth\u00e9".encode(encoding))
    assert read_text(tmp_path / "t.txt") == "caf\u00e9\r\nth\u00e9"


def test_text_that_is_not_utf8_names_line_byte_and_way_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("a\nb\nun caf\u00e9".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"t.csv:3: byte 0xe9 .number 11 of the file. is not UTF-8; save"):
        read_text(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="--encoding cp1252"):
        read_text(tmp_path / "t.csv", option=True)
    assert read_text(tmp_path / "t.csv", "cp1252").endswith("caf\u00e9")


def test_utf16_without_a_mark_is_no_utf8_text() -> None:
    """Its ASCII part decodes as UTF-8, with a NUL after each letter."""
    with pytest.raises(ConfigError, match="x:1: a NUL character"):
        decode_text("path,caption".encode("utf-16-le"), "x")
    assert decode_text("a,b".encode("utf-16-le"), "x", "utf-16-le") == "a,b"


@pytest.mark.parametrize("encoding", ["klingon", "hex", "rot13", "idna"])
def test_an_encoding_that_is_none_of_text_is_an_error(encoding: str) -> None:
    with pytest.raises(ConfigError):
        decode_text(b"\xe9a..b\n" * 20, "x", encoding)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n}', "x:2: not json"),
        ('["\\ud800"]', "half of a character"),
        ("[" * 100_000, "too deeply nested"),
        ("9" * 5000, "not json that can be read"),
    ],
)
def test_json_that_cannot_be_read_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_json(text, "x")


def test_files_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.json: cannot be read .No such file"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_text(tmp_path)
    with pytest.raises(ConfigError, match="no file has such a name"):
        read_text("a\0b")


def test_lines_end_where_files_end_them_and_nowhere_else() -> None:
    """str.splitlines would cut a caption at U+2028 and a form feed."""
    assert lines_of("a\u2028b\x0cc\r\nd\re\n\n") == ["a\u2028b\x0cc", "d", "e", ""]
    assert lines_of("") == []
