"""`selora pack --dataset`: the counts and names of the benchmark's table, and its output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli.main import main
from pipeline.data.eval.wds_layout import open_eval_set
from pipeline.data.originals.convert import original
from pipeline.data.originals.imagenet import wnids
from pipeline.data.originals.table import ORIGINALS
from pipeline.data.shards.index import load_index
from pipeline.data.shards.verify import verify
from pipeline.doctor.benchmark import check_row
from pipeline.evaluation.datasets.benchmark import load_benchmark

ROWS = load_benchmark("paper", root=".").rows


def test_the_converters_and_the_benchmarks_count_alike() -> None:
    vision = load_benchmark("vision", root=".").rows
    source = [row for row in vision if row.key not in {each.key for each in ROWS}]
    assert {row.key: (row.images, row.classes, row.texts) for row in (*ROWS, *source)} == {
        name: (original.images, original.classes, original.captions) for name, original in ORIGINALS.items()
    }
    assert {row.key: row.bank_images for row in source} == {
        name: original.bank.images for name, original in ORIGINALS.items() if original.bank is not None
    }
    targets = [row for row in vision if row.group == "id"]
    assert [original(row.key, row.split).images for row in targets] == [row.images for row in targets]
    assert all("train" in ORIGINALS[row.key].splits for row in targets)


def test_the_labels_of_a_and_r_are_the_benchmarks_subsets() -> None:
    for row in ROWS:
        flag = {"imagenet-a": "A", "imagenet-r": "R"}.get(row.key)
        if flag is not None:
            assert row.subset == tuple((wnids().index(wnid),) for wnid in wnids(flag))


def test_a_dataset_of_the_right_counts_is_packed(
    photo: Callable[..., Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dataset of the right counts becomes the set of the benchmark."""
    (tmp_path / "flickr30k-images").mkdir()
    photo(0, 16, 12).save(tmp_path / "one.jpg")
    images = []
    for number in range(1000):
        (tmp_path / f"flickr30k-images/{number}.jpg").write_bytes((tmp_path / "one.jpg").read_bytes())
        sentences = [{"raw": f"caption {n} of {number}"} for n in range(5)]
        images.append({"filename": f"{number}.jpg", "split": "test", "sentences": sentences})
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    out = tmp_path / "wds_flickr30k"
    assert main(["pack", "--dataset", "flickr30k", str(tmp_path), str(out)]) == 0
    said = capsys.readouterr().out
    assert "flickr30k, 1000 images in 1 shards, all of them\nlicence: research; non-commercial research\n" in said
    found = open_eval_set(out)
    assert found.captions[7] == tuple(f"caption {n} of 7" for n in range(5))
    (tmp_path / "flickr30k-images/77.jpg").unlink()
    assert main(["pack", "--dataset", "flickr30k", str(tmp_path), str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert "images: 999 found, 1000 expected" in said
    assert "missing: 77.jpg" in said
    assert "likely: an interrupted download or extraction" in said


def test_splits_become_training_shards_and_an_evaluation_set(
    photo: Callable[..., Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, names = tmp_path / "root/dtd/dtd", ["banded", *(f"texture_{n:02d}" for n in range(46))]
    (base / "labels").mkdir(parents=True)
    photo(0, 16, 12).save(tmp_path / "one.jpg")
    for split in ("train", "val"):
        files = [f"{name}/{split}_{n}.jpg" for name in names for n in range(40)]
        (base / f"labels/{split}1.txt").write_text("".join(f"{file}\n" for file in files))
        for file in files:
            (base / "images" / file).parent.mkdir(parents=True, exist_ok=True)
            (base / "images" / file).write_bytes((tmp_path / "one.jpg").read_bytes())
    shards, sets = tmp_path / "shards", tmp_path / "sets"
    command = ["pack", "--dataset", "dtd", "--split"]
    assert main([*command, "train", str(tmp_path / "root"), str(shards), "--samples-per-shard", "500"]) == 0
    said = capsys.readouterr().out
    assert f"{shards}: 1880 samples, 47 classes in 4 shards\nlicence: research" in said
    index = load_index(shards)
    assert index.classes is not None and index.classes[:2] == ("banded", "texture 00")
    assert verify(shards).ok
    assert main([*command, "val", str(tmp_path / "root"), str(sets / "wds_dtd-val")]) == 0
    assert "dtd (val), 1880 images in 1 shards, all of them" in capsys.readouterr().out
    row = next(row for row in load_benchmark("vision", root=sets).rows if row.key == "dtd")
    found = check_row(row)
    assert found.ok
    assert found.text.startswith("1880 images, 47 classes; digest ")
    (base / "images/banded/train_3.jpg").unlink()
    assert main([*command, "train", str(tmp_path / "root"), str(tmp_path / "again")]) == 2
    assert "images: 1879 found, 1880 expected" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet-train", "--split", "train"], "cannot be combined with --split"),
        (["--dataset", "cifar10", "--split", "train", "--part", "1/2"], "cannot be combined with --part"),
        (["--dataset", "cifar10", "--split", "train", "--eval"], "cannot be combined with --eval"),
        (["--dataset", "flowers", "--split", "val", "--seed", "1"], "cannot be combined with --seed"),
        (["--dataset", "mnist", "--split", "train"], "--split: 'train' of mnist is not packed, only test"),
        (["--dataset", "cifar", "--split", "train"], "'cifar' is not known"),
        (["--split", "train"], "--split needs --dataset"),
        (["--dataset", "cifar"], "'cifar' is not known; there are imagenet, imagenet100"),
        (
            ["--dataset", "cifar10", "--format", "csv", "--part", "1/2"],
            "cannot be combined with --format, --part",
        ),
        (
            ["--dataset", "imagenet-train", "--templates", "simple"],
            "cannot be combined with --templates",
        ),
        (["--part", "1/2"], "--part needs --dataset imagenet-train"),
        (["--dataset", "imagenet-train"], "no folder n01440764 in it or in train/"),
        (["--dataset", "stl10"], "it must hold class_names.txt, test_X.bin and test_y.bin"),
    ],
)
def test_mistakes_end_in_2_with_a_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "root").mkdir()
    assert main(["pack", *arguments, str(tmp_path / "root"), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", ["0/2", "3/2", "x", "1/0", "1"])
def test_a_part_is_one_of_some(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["pack", "--dataset", "imagenet-train", "--part", said, str(tmp_path), str(tmp_path / "out")])
    assert left.value.code == 2
    assert f"should be I/N with I from 1 to N, got '{said}'" in capsys.readouterr().err
