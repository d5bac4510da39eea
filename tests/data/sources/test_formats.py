"""The formats of sources, and the messages for anything else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.inspection import inspect
from pipeline.data.sources.sample import SourceOptions, sample_key
from pipeline.data.storage.tar import split_name


@pytest.fixture
def pictures(tmp_path: Path, photo: Callable[..., Image.Image]) -> Path:
    folder = tmp_path / "lists"
    (folder / "images").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "c d.webp", "e.jpg"):
        photo(len(name)).save(folder / "images" / name)
    return folder


def test_class_folders_are_labels_in_sorted_order(class_folders: Path) -> None:
    source = read_source(class_folders)
    assert (source.format, len(source.samples)) == ("imagefolder", 53)
    assert source.classes == ["ankle boot", "hat", "t-shirt"]
    assert [sample.name for sample in source.samples] == sorted(sample.name for sample in source.samples)
    assert {(sample.name.partition("/")[0], sample.cls) for sample in source.samples} == {
        ("ankle_boot", 0),
        ("hat", 1),
        ("t-shirt", 2),
    }
    assert source.samples[0].key == "ankle_boot/000"


def test_class_folders_may_be_deep_and_hold_other_files(tmp_path: Path, photo: Callable[..., Image.Image]) -> None:
    for name in ("hat/deep/er/x.JPEG", "hat/x.jpg", "hat/x.png", "cap/y.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(1).save(tmp_path / name, "PNG" if name.endswith("png") else "JPEG")
    (tmp_path / "hat/notes.txt").write_text("mine")
    (tmp_path / "hat/.DS_Store").write_text("")
    (tmp_path / ".git").mkdir()
    source = read_source(tmp_path)
    assert source.classes == ["cap", "hat"]
    assert [sample.name for sample in source.samples] == ["cap/y.jpg", "hat/x.jpg", "hat/x.png", "hat/deep/er/x.JPEG"]
    assert len({sample.key for sample in source.samples}) == 4
    assert source.ignored == {"hidden and system files": 1, ".txt files": 1}


@pytest.mark.parametrize(
    "name", ["dog/a.b.jpg", "Hund/ä ö.jpg", "__x__/y.jpg", "__y__.jpg", "a/" + "n" * 200 + ".jpg", "./../p.jpg"]
)
def test_any_name_gives_a_key_that_readers_do_not_split(name: str) -> None:
    """Any name gives a key that a tar can hold and readers do not split."""
    key = sample_key(name)
    assert split_name(key + ".jpg") == (key, "jpg")
    assert len(key.encode()) <= 80
    assert key != sample_key(name.replace(".jpg", "2.jpg"))


def test_a_classnames_file_overrides_folder_names(class_folders: Path, tmp_path: Path) -> None:
    """A classnames file overrides folder names and two equal names are refused."""
    names = tmp_path / "names.txt"
    names.write_text("t-shirt\tT-shirt\nhat\tsun hat\nankle_boot\tboot\n")
    assert read_source(class_folders, SourceOptions(classnames=names)).classes == ["boot", "sun hat", "T-shirt"]
    names.write_text("hat\nhat\nshirt\n")
    with pytest.raises(ConfigError, match="2 classes read 'hat'"):
        read_source(class_folders, SourceOptions(classnames=names))


def test_flyps_table_is_read_as_it_is(pictures: Path) -> None:
    """FLYP's table is read as it is and rows of one image are its captions."""
    table = pictures / "train.csv"
    table.write_text(
        "title\tfilepath\na photo of a hat.\timages/a.jpg\na cap, really\timages/b.png\nthe hat\timages/a.jpg\n"
    )
    source = read_source(table)
    assert source.format == "csv"
    assert source.classes is None
    assert [(sample.name, sample.captions) for sample in source.samples] == [
        ("images/a.jpg", ("a photo of a hat.", "the hat")),
        ("images/b.png", ("a cap, really",)),
    ]
    assert source.samples[0].image == pictures / "images/a.jpg"


def test_csv_with_quotes_bom_and_absolute_paths(pictures: Path) -> None:
    table = pictures / "train.csv"
    absolute = pictures / "images" / "c d.webp"
    table.write_text(f'path,caption\nimages/a.jpg,"a hat, on\n a table"\n"{absolute}",x\n', encoding="utf-8-sig")
    samples = read_source(table).samples
    assert [sample.captions for sample in samples] == [("a hat, on a table",), ("x",)]
    assert samples[1].image == absolute


def test_a_class_column_makes_sorted_classes(pictures: Path) -> None:
    """A class column makes classes and numbers are sorted as numbers."""
    table = pictures / "train.tsv"
    table.write_text("image\tclass\nimages/a.jpg\tsun_hat\nimages/b.png\tcap\n")
    source = read_source(table)
    assert source.classes == ["cap", "sun hat"]
    assert [sample.cls for sample in source.samples] == [1, 0]
    table.write_text("image\tlabel\nimages/a.jpg\t10\nimages/b.png\t9\n")
    assert read_source(table).classes == ["9", "10"]


def test_columns_of_other_names_can_be_given(pictures: Path) -> None:
    table = pictures / "t.csv"
    table.write_text("where;what;who\nimages/a.jpg;hat;me\n")
    with pytest.raises(ConfigError, match="the columns are where, what, who; give --image-column"):
        read_source(table)
    with pytest.raises(ConfigError, match="no caption and no class column among where, what, who"):
        read_source(table, SourceOptions(image_column="where"))
    with pytest.raises(ConfigError, match="no column 'wo'.*the columns are where, what, who"):
        read_source(table, SourceOptions(image_column="wo"))
    source = read_source(table, SourceOptions(image_column="where", class_column="what", caption_column="who"))
    assert (source.classes, source.samples[0].captions) == (["hat"], ("me",))


def test_rows_without_a_file_are_listed_not_dropped(pictures: Path) -> None:
    table = pictures / "t.csv"
    table.write_text("path,caption\nimages/a.jpg,hat\nimages/nowhere.jpg,hat\n")
    source = read_source(table)
    assert (len(source.samples), [each.name for each in source.left_out]) == (1, ["images/nowhere.jpg"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption\n", "at least one row"),
        ("path,class\na.jpg,hat\na.jpg,cap\n", "line 3: a.jpg has the classes 'hat' and 'cap'"),
    ],
)
def test_a_broken_table_is_an_error_at_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_source(tmp_path / "t.csv")


def test_coco_captions_keep_all_captions_of_an_image(pictures: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.png"}, {"id": 3, "file_name": "e.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "a hat"},
            {"image_id": 2, "caption": "a\ncap "},
            {"image_id": 1, "caption": "the hat"},
        ],
    }
    file = pictures / "captions_val.json"
    file.write_text(json.dumps(content))
    source = read_source(file)
    assert [(sample.name, sample.captions) for sample in source.samples] == [
        ("a.jpg", ("a hat", "the hat")),
        ("b.png", ("a cap",)),
    ]
    assert [str(each) for each in source.left_out] == ["e.jpg: no caption"]


def test_coco_images_are_found_where_its_downloads_have_them(pictures: Path) -> None:
    os.rename(pictures / "images", pictures / "val2017")
    (pictures / "annotations").mkdir()
    file = pictures / "annotations" / "captions_val2017.json"
    content = {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "caption": "x"}]}
    file.write_text(json.dumps(content))
    image = read_source(file).samples[0].image
    assert isinstance(image, Path)
    assert image.samefile(pictures / "val2017" / "a.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "not json"),
        ("[]", "'images' and 'annotations'.*found list"),
        ('{"images": []}', "found an object of images"),
        ('{"images": [], "annotations": [{"bbox": []}]}', "no 'caption'"),
    ],
)
def test_other_json_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_source(tmp_path / "x.json")


def test_unknown_sources_are_errors_with_what_was_seen(tmp_path: Path) -> None:
    """Sources of no known look are errors that say what was seen."""
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no class folders"):
        read_source(tmp_path)
    (tmp_path / "hat").mkdir()
    with pytest.raises(ConfigError, match="hat: the class folder holds no image"):
        read_source(tmp_path)
    (tmp_path / "x.parquet").write_text("")
    with pytest.raises(ConfigError, match="not a csv, tsv, txt, json"):
        read_source(tmp_path / "x.parquet")
    for split in ("val", "train"):
        (tmp_path / "splits" / split / "hat").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"look like splits \(train, val\), not classes; take one: .*/train"):
        read_source(tmp_path / "splits")


def test_inspect_shows_counts_samples_and_the_next_command(class_folders: Path, pictures: Path) -> None:
    text = str(inspect(class_folders))
    assert "imagefolder, 53 images" in text
    assert "3 classes, 17 images (t-shirt) to 18 (hat)" in text
    assert "ankle_boot/000.jpg | JPEG 48 x 40 RGB | class 0 'ankle boot'" in text
    assert len(inspect(class_folders).samples) == 5
    assert f"selora pack {class_folders} shards/clothes" in text
    assert "train: shards/clothes" in text

    table = pictures / "my list.csv"
    table.write_text("where,caption\nimages/a.jpg,a hat\nimages/x.jpg,a cap\n")
    seen = inspect(table, SourceOptions(image_column="where"))
    assert seen.command == f"selora pack '{table}' --image-column where --max-unreadable 0.5 shards/my-list"
    assert "2 seen = 1 to pack + 1 left out + 0 ignored\n  1 left out, no such file: images/x.jpg" in str(seen)
    assert "were opened cannot be read" not in str(seen)
    assert "templates" not in seen.config


def test_inspect_of_a_source_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\nnowhere.jpg,hat\n")
    with pytest.raises(ConfigError, match="none of its 1 images exists: nowhere.jpg; looked in"):
        inspect(tmp_path / "t.csv")
