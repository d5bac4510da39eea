"""Reference images that are also evaluated are found by content, whatever they are called."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Config, ConfigError, override
from pipeline.data.eval.wds_layout import pack_eval
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
    "change", [{"keep.allow_overlap": True}, {"keep.weight": 0.0}, {"keep.images": None}, {"eval.benchmark": None}]
)
def test_overlap_that_cannot_matter_or_is_allowed_passes(config: Config, change: dict[str, object]) -> None:
    check_overlap(override(config, change))


def test_other_images_pass(config: Config, tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    pack(image_folder(classes=2, each=6, seed=3), tmp_path / "others")
    check_overlap(override(config, {"keep.images": str(tmp_path / "others")}))
