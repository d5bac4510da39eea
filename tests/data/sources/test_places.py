"""The images of a list are found in the usual places, and never another image of the same name."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import SourceOptions

Images = Callable[..., list[Path]]


def table(folder: Path, *names: str, where: str = "t.csv") -> Path:
    file = folder / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("path,caption\n" + "".join(f"{name},of {name}\n" for name in names), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("kept", "named", "where"),
    [
        ("a.jpg", "a.jpg", "t.csv"),
        ("a.jpg", "./a.jpg", "t.csv"),
        ("Images/a.jpg", "a.jpg", "captions.txt"),
        ("data/train/n01/a.JPEG", "./data/train/n01/a.JPEG", "datasets/csv/t.csv"),
        ("images/deep/a.jpg", r"images\deep\a.jpg", "t.csv"),
        ("images/a.jpg", r"C:\Users\me\images\a.jpg", "t.csv"),
        ("images/a.jpg", "/home/someone/else/images/a.jpg", "t.csv"),
        ("images/a.jpg", "a.jpg", "annotations/captions.csv"),
        ("val2017/a.jpg", "a.jpg", "annotations/captions_val2017.csv"),
        ("images/a.jpg", "train2017/a.jpg", "annotations/t.csv"),
        ("train/a.jpg", "a", "labels.csv"),
    ],
)
def test_images_are_found_where_layouts_have_them(
    tmp_path: Path, images: Images, kept: str, named: str, where: str
) -> None:
    """Flickr8k, FLYP from any directory, tables from Windows and other machines, COCO, Kaggle's ids."""
    (file,) = images(kept)
    source = read_source(table(tmp_path, named, where=where))
    assert [Path(str(sample.image)).resolve() for sample in source.samples] == [file.resolve()]


def test_paths_relative_to_where_one_stands_are_found(
    tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    images("work/photos/deep/a.jpg")
    monkeypatch.chdir(tmp_path / "work")
    assert len(read_source(table(tmp_path / "lists" / "of" / "mine" / "x" / "y", "photos/deep/a.jpg")).samples) == 1


def test_image_root_is_the_only_place_when_given(tmp_path: Path, images: Images) -> None:
    images("a.jpg", "elsewhere/a.jpg")
    file = table(tmp_path, "a.jpg")
    (sample,) = read_source(file, SourceOptions(image_root=tmp_path / "elsewhere")).samples
    assert sample.image == tmp_path / "elsewhere" / "a.jpg"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"a.jpg; looked in {tmp_path / 'empty'}$"):
        read_source(file, SourceOptions(image_root=tmp_path / "empty"))


def test_a_name_that_fits_two_images_is_left_out(tmp_path: Path, images: Images) -> None:
    """Either would be a guess, and half of the guesses a wrong caption."""
    images("left/a.jpg", "right/a.jpg", "left/b.jpg")
    source = read_source(table(tmp_path, "a.jpg", "b.jpg"))
    assert [sample.name for sample in source.samples] == ["b.jpg"]
    assert "give --image-root DIR" in str(source.left_out[0])


def test_two_names_never_share_an_image_by_its_last_part(tmp_path: Path, images: Images) -> None:
    """cat/1.jpg and dog/1.jpg, when only one flat folder is there."""
    images("images/1.jpg", "images/2.jpg")
    source = read_source(table(tmp_path, "cat/1.jpg", "dog/1.jpg", "cat/2.jpg"))
    assert [sample.name for sample in source.samples] == ["cat/2.jpg"]
    assert [each.name for each in source.left_out] == ["cat/1.jpg", "dog/1.jpg"]


def test_file_names_of_the_other_unicode_form_are_found(tmp_path: Path, images: Images) -> None:
    """A disk that macOS wrote has decomposed names, a table from elsewhere composed ones."""
    images(unicodedata.normalize("NFD", "caf\u00e9.jpg"))
    assert len(read_source(table(tmp_path, unicodedata.normalize("NFC", "caf\u00e9.jpg"))).samples) == 1


def test_missing_images_say_where_they_were_looked_for(tmp_path: Path, images: Images) -> None:
    images("images/a.jpg")
    source = read_source(table(tmp_path, "a.jpg", "b.jpg"))
    assert [str(each) for each in source.left_out] == ["b.jpg: no such file"]
    assert any(f"looked for in {tmp_path}" in note and "--image-root" in note for note in source.notes)


def test_a_folder_with_a_captions_table_is_that_table(tmp_path: Path, images: Images) -> None:
    """Flickr8k's folder would be one class called "Images"."""
    images("Images/a.jpg", "Images/b.jpg")
    table(tmp_path, "a.jpg", "b.jpg", where="captions.txt")
    (tmp_path / "readme.txt").write_text("about this folder\n")
    source = read_source(tmp_path)
    assert (source.format, source.classes, len(source.samples)) == ("csv", None, 2)
    assert "captions.txt" in source.notes[0]


def test_metadata_in_hf_imagefolder_is_read(tmp_path: Path, images: Images) -> None:
    images("cats/a.jpg", "dogs/b.jpg")
    rows = [{"file_name": name, "text": f"of {name}"} for name in ("cats/a.jpg", "dogs/b.jpg")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = read_source(tmp_path)
    assert [sample.captions for sample in source.samples] == [("of cats/a.jpg",), ("of dogs/b.jpg",)]


def test_two_lists_in_a_folder_are_not_chosen_between(tmp_path: Path, images: Images) -> None:
    images("images/a.jpg")
    table(tmp_path, "a.jpg", where="train.csv")
    table(tmp_path, "a.jpg", where="test.csv")
    with pytest.raises(ConfigError, match="test.csv, train.csv name its images; take one"):
        read_source(tmp_path)


def test_class_folders_with_a_table_stay_class_folders(tmp_path: Path, images: Images) -> None:
    images("cat/a.jpg", "dog/b.jpg")
    table(tmp_path, "cat/a.jpg", where="list.csv")
    source = read_source(tmp_path)
    assert (source.format, source.classes) == ("imagefolder", ["cat", "dog"])
    assert source.account().ignored == {".csv files": 1}
