"""Tables from people and programs: every row is read correctly or left out by name, or the table is refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import Source, SourceOptions


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {sample.name: sample.captions for sample in source.samples}


def left_out(source: Source) -> list[str]:
    account = source.account()
    assert account.seen == account.packed + len(account.left_out) + sum(account.ignored.values())
    return [str(each) for each in account.left_out]


def write(folder: Path, name: str, rows: list[str], encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes("\n".join([*rows, ""]).encode(encoding))
    return folder / name


def test_an_unquoted_tsv_is_read_as_it_is_written(tmp_path: Path, ten: list[str]) -> None:
    """FLYP writes "%s\\t%s\\n": a title that begins with a quote must not swallow the rows below it."""
    texts = [f"caption {name}" for name in ten]
    texts[2], texts[7], texts[8] = '"Untitled, oil on canvas', 'a poster, "Vote"', '"Quoted" by one'
    table = write(tmp_path, "t.tsv", ["title\tfilepath", *(f"{t}\t{n}" for t, n in zip(texts, ten, strict=True))])
    source = read_source(table)
    assert captions(source) == {name: (text,) for name, text in zip(ten, texts, strict=True)}
    assert any("2 fields that begin with a quote are read as written" in note for note in source.notes)


def test_a_tsv_that_pandas_quoted_loses_its_quotes(tmp_path: Path, ten: list[str]) -> None:
    """pandas quotes a field that holds a quote, and doubles that."""
    rows = ["title\tfilepath", f'"a ""big"" hat"\t{ten[0]}', f"a cap\t{ten[1]}"]
    assert captions(read_source(write(tmp_path, "t.tsv", rows))) == {ten[0]: ('a "big" hat',), ten[1]: ("a cap",)}
    rows = ['"title"\t"filepath"', f'"a hat"\t"{ten[0]}"', f'"a cap"\t"{ten[1]}"']
    with pytest.raises(ConfigError, match="no column"):
        read_source(write(tmp_path, "t.tsv", rows[:1] * 2), SourceOptions(image_column="x"))


@pytest.mark.parametrize("row", ['"a hat\ton a table"\t0.jpg', '"two\nlines"\t0.jpg'])
def test_a_quoted_field_that_breaks_a_tsv_is_refused(tmp_path: Path, ten: list[str], row: str) -> None:
    table = write(tmp_path, "t.tsv", ["title\tfilepath", f"a cap\t{ten[1]}", row])
    with pytest.raises(ConfigError, match="t.tsv:3: .*--quotes none.*--quotes csv"):
        read_source(table)
    assert len(read_source(table, SourceOptions(quotes="csv")).samples) == 2


@pytest.mark.parametrize(
    "rows",
    [
        ['0.jpg,"unbalanced', "1.jpg,cap", '2.jpg,a poster, "Vote"'],
        ['0.jpg,"unbalanced', "1.jpg,cap", "2.jpg,it ends here"],
        ['0.jpg,"unbalanced', "1.jpg,cap", '2.jpg,"'],
        ['0.jpg,"Hello" he said', "1.jpg,cap"],
    ],
)
def test_a_quote_that_swallows_rows_of_a_csv_is_refused(tmp_path: Path, ten: list[str], rows: list[str]) -> None:
    with pytest.raises(ConfigError, match="t.csv:2: .*--quotes none"):
        read_source(write(tmp_path, "t.csv", ["path,caption", *rows]))


def test_quotes_that_are_letters_can_be_said_to_be(tmp_path: Path, ten: list[str]) -> None:
    table = write(tmp_path, "t.csv", ["path,caption", '0.jpg,"unbalanced', "1.jpg,cap"])
    assert captions(read_source(table, SourceOptions(quotes="none")))["0.jpg"] == ('"unbalanced',)


def test_a_field_that_never_ends_names_the_line_it_began(tmp_path: Path, ten: list[str]) -> None:
    rows = ["path,caption", "0.jpg,hat", '1.jpg,"' + "long " * 30_000 + '"', "2.jpg,cap"]
    with pytest.raises(ConfigError, match="t.csv:3: .*a field of over 131,072 characters"):
        read_source(write(tmp_path, "t.csv", rows))


def test_images_without_class_are_left_out_by_name(tmp_path: Path, ten: list[str]) -> None:
    """An empty field, or the nan that pandas prints, must not become a class of its own."""
    rows = ["path,label", "0.jpg,cat", "1.jpg,", "2.jpg,nan", "3.jpg,dog", "4.jpg,  "]
    source = read_source(write(tmp_path, "t.csv", rows))
    assert source.classes == ["cat", "dog"]
    assert left_out(source) == ["1.jpg: no class", "2.jpg: no class", "4.jpg: no class"]


def test_rows_without_image_caption_or_columns_are_named(tmp_path: Path, ten: list[str]) -> None:
    """Flickr30k's results.csv lacks a delimiter in line 19999."""
    rows = ["image_name| comment_number| comment", "0.jpg| 0| a hat", "1.jpg| 0   a dog .", "| 0| x", "2.jpg| 0|"]
    source = read_source(write(tmp_path, "results.csv", rows))
    assert captions(source) == {"0.jpg": ("a hat",)}
    assert left_out(source) == [
        "line 3: 2 fields where the header has 3 (image_name, comment_number, comment)",
        "line 4: no image path",
        "2.jpg: no caption",
    ]
    assert source.account().seen == 4


def test_float_labels_of_pandas_are_numbers(tmp_path: Path, images: Callable[..., list[Path]]) -> None:
    """A column of whole numbers with one empty field is written as 0.0, 1.0, … 11.0."""
    names = [f"{number}.jpg" for number in range(12)]
    images(*names)
    table = write(tmp_path, "t.csv", ["path,label", *(f"{name},{i}.0" for i, name in enumerate(names))])
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(12)))
    source = read_source(table, SourceOptions(classnames=tmp_path / "names.txt"))
    assert source.folders == [str(i) for i in range(12)]
    assert source.classes == [f"name {i}" for i in range(12)]
    assert [sample.cls for sample in source.samples] == list(range(12))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_with_a_byte_order_mark_are_read(tmp_path: Path, ten: list[str], encoding: str) -> None:
    """Excel's "CSV UTF-8" and "Unicode text"."""
    table = write(tmp_path, "t.csv", ["path;caption", "0.jpg;un caf\u00e9"], encoding)
    assert captions(read_source(table)) == {"0.jpg": ("un caf\u00e9",)}


def test_a_table_in_another_encoding_needs_it_named(tmp_path: Path, ten: list[str]) -> None:
    table = write(tmp_path, "t.csv", ["path;caption", "0.jpg;un caf\u00e9"], "cp1252")
    with pytest.raises(ConfigError, match="t.csv:2: byte 0xe9.*--encoding cp1252"):
        read_source(table)
    assert captions(read_source(table, SourceOptions(encoding="cp1252"))) == {"0.jpg": ("un caf\u00e9",)}
    with pytest.raises(ConfigError, match="--encoding: 'klingon'"):
        read_source(table, SourceOptions(encoding="klingon"))


def test_excels_first_line_names_the_delimiter(tmp_path: Path, ten: list[str]) -> None:
    table = write(tmp_path, "t.csv", ["sep=;", "path;caption", "0.jpg;a hat, a cap, a boot"])
    assert captions(read_source(table)) == {"0.jpg": ("a hat, a cap, a boot",)}


def test_a_table_without_header_is_told_by_its_images(tmp_path: Path, ten: list[str]) -> None:
    """Its first image must not be lost as a name of a column."""
    table = write(tmp_path, "t.csv", ["0.jpg,a hat", "1.jpg,a cap"])
    with pytest.raises(ConfigError, match="t.csv:1: no header.*--image-column 1 --caption-column 2"):
        read_source(table)
    source = read_source(table, SourceOptions(image_column="1", caption_column="2"))
    assert captions(source) == {"0.jpg": ("a hat",), "1.jpg": ("a cap",)}


def test_flickrs_own_token_file_is_read(tmp_path: Path, ten: list[str]) -> None:
    rows = ["0.jpg#0\ta hat", '0.jpg#1\t"the hat', "1.jpg#0\ta cap #2"]
    found = captions(read_source(write(tmp_path, "Flickr8k.token.txt", rows)))
    assert found == {"0.jpg": ("a hat", '"the hat'), "1.jpg": ("a cap #2",)}


@pytest.mark.parametrize("cell", ['"[""a hat"", ""the hat""]"', "\"['a hat', 'the hat']\""])
def test_a_list_in_a_cell_is_several_captions(tmp_path: Path, ten: list[str], cell: str) -> None:
    table = write(tmp_path, "t.csv", ["filename,raw", f"0.jpg,{cell}", "1.jpg,[sic] a cap"])
    assert captions(read_source(table)) == {"0.jpg": ("a hat", "the hat"), "1.jpg": ("[sic] a cap",)}


def test_the_columns_that_are_read_are_named(tmp_path: Path, ten: list[str]) -> None:
    table = write(tmp_path, "t.csv", ["Image Name,Comment,split", "0.jpg,a hat,train"])
    told = read_source(table).notes[0]
    assert told == "columns: images from 'Image Name', captions from 'Comment'; not used: split"


def test_one_class_and_classes_without_names_are_noted(tmp_path: Path, ten: list[str]) -> None:
    notes = read_source(write(tmp_path, "t.csv", ["path,label", "0.jpg,n01440764"])).notes
    assert any("WordNet ids" in note and "--classnames" in note for note in notes)
    assert any("only one class" in note for note in notes)


def test_classes_in_two_unicode_forms_are_one(tmp_path: Path, ten: list[str]) -> None:
    forms = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    source = read_source(write(tmp_path, "t.csv", ["path,label", f"0.jpg,{forms[0]}", f"1.jpg,{forms[1]}"]))
    assert source.classes == [forms[0]]


def test_a_caption_keeps_its_backslashes(tmp_path: Path, ten: list[str]) -> None:
    text = "plot of $\\nu$ in C:\\new\\n0"
    assert captions(read_source(write(tmp_path, "t.csv", ["path,caption", f"0.jpg,{text}"]))) == {"0.jpg": (text,)}
