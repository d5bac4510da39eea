"""JSON files that name images, complete and with missing values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import Source


def read(folder: Path, content: Any, name: str = "x.json") -> Source:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_source(folder / name)


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {sample.name: sample.captions for sample in source.samples}


def test_holes_in_coco_json_are_left_out_and_counted(tmp_path: Path, ten: list[str]) -> None:
    images = [
        {"id": 1, "file_name": "0.jpg"},
        {"id": 2, "file_name": "1.jpg"},
        {"id": 3},
        {"file_name": "2.jpg"},
        {"id": 5, "file_name": None},
        None,
        {"id": "6", "file_name": "3.jpg"},
    ]
    annotations = [
        {"image_id": 1, "caption": "a hat"},
        {"image_id": 2, "caption": None},
        {"caption": "of nothing"},
        {"image_id": 99, "caption": "of an image that is not listed"},
        {"image_id": 6, "caption": "its id is text elsewhere"},
        7,
    ]
    source = read(tmp_path, {"images": images, "annotations": annotations})
    assert captions(source) == {"0.jpg": ("a hat",), "3.jpg": ("its id is text elsewhere",)}
    account = source.account()
    assert (account.seen, account.packed) == (7, 2)
    assert account.reasons == {"no image path": 3, "no caption": 2}
    assert [each.name for each in account.left_out] == [
        "images[2] (id 3)",
        "images[4] (id 5)",
        "images[5]",
        "1.jpg",
        "2.jpg",
    ]
    assert any("3 annotations have no caption or no image_id" in note for note in source.notes)
    assert any("1 captions are of images that 'images' does not list (image_id 99)" in note for note in source.notes)


@pytest.mark.parametrize(
    "content",
    [
        [{"image": "0.jpg", "caption": ["a hat", "the hat"]}, {"image": "1.jpg", "caption": "a cap"}],
        {"0.jpg": ["a hat", "the hat"], "1.jpg": "a cap"},
        {"data": [{"file_name": "0.jpg", "text": ["a hat", "the hat"]}, {"file_name": "1.jpg", "text": "a cap"}]},
        '{"file_name": "0.jpg", "text": ["a hat", "the hat"]}\n\n{"file_name": "1.jpg", "text": "a cap"}\n',
        {
            "images": [
                {"filepath": "images", "filename": "0.jpg", "sentences": [{"raw": "a hat"}, {"raw": "the hat"}]},
                {"filepath": "images", "filename": "1.jpg", "sentences": [{"raw": "a cap"}], "split": "restval"},
                {"filepath": "images", "filename": "2.jpg", "sentences": [{"raw": "kept apart"}], "split": "test"},
            ]
        },
    ],
)
def test_captions_in_json_of_many_shapes_are_read(tmp_path: Path, ten: list[str], content: Any) -> None:
    """BLIP's list, an object by image, a list in an object, json lines, and Karpathy's file without its test images."""
    found = captions(read(tmp_path, content))
    assert {name.rpartition("/")[2]: texts for name, texts in found.items()} == {
        "0.jpg": ("a hat", "the hat"),
        "1.jpg": ("a cap",),
    }


def test_metadata_jsonl_names_the_line_that_is_broken(tmp_path: Path, ten: list[str]) -> None:
    lines = '{"file_name": "0.jpg", "text": "a hat"}\n{"file_name": "1.jpg", "text": \n'
    with pytest.raises(ConfigError, match="metadata.jsonl:2:1: not json"):
        read(tmp_path, lines, "metadata.jsonl")


def test_records_with_holes_are_left_out(tmp_path: Path, ten: list[str]) -> None:
    content = [{"image": "0.jpg", "label": "hat"}, {"image": "1.jpg"}, {"label": "cap"}, "x", {"image": 7, "label": 3}]
    account = read(tmp_path, content).account()
    assert account.seen == 5
    assert account.reasons == {"no image path": 2, "no class": 1}
    assert account.packed == 2


def test_text_that_no_file_can_hold_is_refused(tmp_path: Path, ten: list[str]) -> None:
    with pytest.raises(ConfigError, match="half of a character"):
        read(tmp_path, '[{"image": "0.jpg", "caption": "a \\ud800 hat"}]')
