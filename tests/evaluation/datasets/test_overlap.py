"""Reference images that are also evaluated are found by content, whatever their names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Config, ConfigError, override
from pipeline.data.eval.wds_layout import pack_eval
from pipeline.data.reference.features import content_hash
from pipeline.data.shards.index import pack
from pipeline.evaluation.datasets.overlap import check_overlap


@pytest.fixture
def config(tmp_path: Path, image_folder: Callable[..., Path]) -> Config:
    """Two of the twelve reference images are in the evaluation set under other names."""
    evaluated, reference = image_folder(classes=2, each=6, seed=1), image_folder(classes=2, each=6, seed=2)
    for number in range(2):
        shutil.copy(evaluated / "class_1" / f"00{number}.jpg", reference / "class_0" / f"00{number}.jpg")
    pack_eval(evaluated, tmp_path / "evaluated")
    pack(reference, tmp_path / "reference")
    benchmark = tmp_path / "benchmark.yaml"
    benchmark.write_text("name: mine\ndatasets:\n  - {key: clothes, group: id, path: evaluated}\n", encoding="utf-8")
    return Config.model_validate(
        {
            "data": {"train": "unused"},
            "keep": {"weight": 3.0, "images": str(tmp_path / "reference")},
            "eval": {"benchmark": str(benchmark)},
        }
    )


def test_overlapping_images_are_counted_and_named(config: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        check_overlap(config)
    message = str(caught.value)
    assert "2 of its images are also evaluated (clothes 0.tar/" in message
    assert "keep.allow_overlap=true" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"keep.allow_overlap": True},
        {"keep.weight": 0.0},
        {"keep.images": None},
        {"keep.images": "s3://bucket/reference"},
        {"eval.benchmark": None},
    ],
)
def test_overlap_that_cannot_matter_or_is_allowed_passes(
    config: Config, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overlap is there, and no image is read to look for it."""
    opened: list[object] = []
    monkeypatch.setattr("pipeline.evaluation.datasets.overlap.load_index", opened.append)
    check_overlap(override(config, change))
    assert not opened


def test_another_image_of_the_same_size_passes(
    config: Config, tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only files of equal size are read, and these two differ in one byte."""
    evaluated, reference = image_folder(classes=2, each=2, seed=3), image_folder(classes=2, each=2, seed=4)
    image = Image.open(evaluated / "class_0" / "000.jpg").copy()
    for folder, comment in ((evaluated, b"a"), (reference, b"b")):
        image.save(folder / "class_0" / "000.jpg", comment=comment)
    pack_eval(evaluated, tmp_path / "evaluated", force=True)
    pack(reference, tmp_path / "reference", force=True)
    read: list[bytes] = []
    monkeypatch.setattr(
        "pipeline.evaluation.datasets.overlap.content_hash", lambda data: read.append(data) or content_hash(data)
    )
    check_overlap(config)
    assert len(read) >= 2
    assert sum(one != other for one, other in zip(*read[:2], strict=True)) == 1
