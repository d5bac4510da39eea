"""Evaluation sets: read as clip_benchmark reads them, shared over ranks with exact counts."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.eval.batches import EvalBatch, eval_loader
from pipeline.data.eval.wds_layout import EvalSet, open_eval_set, pack_eval, write_wds_eval
from pipeline.data.images import normalize
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import Sample

CFG = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}
TEMPLATES = ["a photo of a {c}.", "the {c}"]


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., Image.Image]) -> list[Sample]:
    """Images of every kind a user may have, with a class and captions."""
    folder = tmp_path_factory.mktemp("odd")
    exif = Image.Exif()
    exif[0x0112] = 8
    photo(1).save(folder / "a.jpg")
    photo(2).save(folder / "b.jpeg", exif=exif)
    photo(3).save(folder / "c.png")
    photo(4).convert("P").save(folder / "d.png")
    photo(5).convert("I;16").save(folder / "e.png")
    photo(6).save(folder / "f.webp", lossless=True)
    photo(7).save(folder / "g.tiff")
    photo(8).save(folder / "h.bmp")
    photo(9).convert("CMYK").save(folder / "i.jpg")
    return [
        Sample(path.stem, path.name, path, number % 2, (f"caption {number}", f"two\nlines {number}")[: 1 + number % 2])
        for number, path in enumerate(sorted(folder.iterdir()))
    ]


@pytest.fixture
def eval_set(class_folders: Path, tmp_path: Path) -> EvalSet:
    source = read_source(class_folders)
    return write_wds_eval(
        source.samples, tmp_path / "clothes", classnames=source.classes, templates=TEMPLATES, samples_per_shard=20
    )


def theirs(folder: Path, transform: Any) -> Any:
    return build_wds_dataset("wds", transform=transform, data_dir=str(folder))


def all_batches(chosen: EvalSet, batch_size: int = 7, workers: int = 0, **options: Any) -> list[EvalBatch]:
    return list(eval_loader(chosen, CFG, batch_size=batch_size, workers=workers, **options))


def test_clip_benchmark_reads_equal_pixels_and_labels(odd_files: list[Sample], tmp_path: Path) -> None:
    """Clip_benchmark reads what is written with the same pixels and labels."""
    ours = write_wds_eval(
        odd_files, tmp_path / "odd", classnames=["hat", "ankle boot"], templates=TEMPLATES, samples_per_shard=4
    )
    reader = theirs(tmp_path / "odd", image_transform(32, is_train=False))
    assert (reader.classes, reader.templates) == (["hat", "ankle boot"], TEMPLATES)
    images, labels = zip(*reader, strict=True)
    found = all_batches(ours)
    pixels = torch.cat([normalize(batch.images, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) for batch in found])
    assert torch.equal(pixels, torch.stack(images))
    assert torch.cat([batch.labels for batch in found]).tolist() == list(labels) == [n % 2 for n in range(9)]
    assert (ours.classnames, ours.templates) == (("hat", "ankle boot"), tuple(TEMPLATES))


def test_turned_or_clipped_images_are_stored_as_trained_on(odd_files: list[Sample], tmp_path: Path) -> None:
    """What other readers would see turned or clipped is stored as training sees it."""
    write_wds_eval(odd_files, tmp_path / "odd", classnames=["a", "b"], templates=TEMPLATES)
    with tarfile.open(tmp_path / "odd/test/0.tar") as tar:
        names = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    stored = [name.partition(".")[2] for name in names if not name.endswith((".cls", ".txt"))]
    assert stored == ["jpg", "png", "png", "png", "png", "webp", "png", "png", "jpg"]
    assert names["s0000000.jpg"] == odd_files[0].image.read_bytes()
    reader = theirs(tmp_path / "odd", lambda image: image)
    images = [image for image, _ in reader]
    assert [image.size for image in images][:2] == [(48, 40), (40, 48)]
    assert images[4].getextrema()[0][1] < 255


def test_a_retrieval_set_keeps_all_captions(odd_files: list[Sample], tmp_path: Path) -> None:
    """A retrieval set keeps all captions as clip_benchmark reads them."""
    ours = write_wds_eval(odd_files, tmp_path / "pairs", kind="retrieval", samples_per_shard=4)
    reader = theirs(tmp_path / "pairs", lambda image: image.size)
    assert [tuple(texts) for _, texts in reader] == list(ours.captions)
    assert ours.captions[:2] == (("caption 0",), ("caption 1", "two\\nlines 1"))
    found = all_batches(ours)
    assert [texts for batch in found for texts in batch.captions] == list(ours.captions)
    assert all(batch.labels.numel() == 0 for batch in found)
    assert (ours.kind, ours.labels, ours.classnames) == ("retrieval", (), None)


@pytest.mark.parametrize(("world", "batch_size", "workers"), [(1, 7, 0), (2, 7, 0), (4, 64, 0), (3, 1, 2), (60, 8, 0)])
def test_ranks_have_every_sample_once_in_order_without_padding(
    eval_set: EvalSet, world: int, batch_size: int, workers: int
) -> None:
    parts = [
        all_batches(eval_set, rank=rank, world=world, batch_size=batch_size, workers=workers) for rank in range(world)
    ]
    indices = [i for part in parts for batch in part for i in batch.indices.tolist()]
    assert indices == list(range(53))
    labels = [label for part in parts for batch in part for label in batch.labels.tolist()]
    assert labels == list(eval_set.labels)
    sizes = [sum(len(batch.indices) for batch in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_limit_spreads_over_the_whole_set(eval_set: EvalSet) -> None:
    found = [
        i for rank in range(2) for batch in all_batches(eval_set, rank=rank, world=2, limit=10) for i in batch.indices
    ]
    assert [int(i) for i in found] == [i * 53 // 10 for i in range(10)]
    assert {eval_set.labels[int(i)] for i in found} == {0, 1, 2}
    assert sum(len(batch.indices) for batch in all_batches(eval_set, limit=1000)) == 53


def test_fast_pixels_are_within_two_levels(eval_set: EvalSet) -> None:
    for fast, reference in zip(all_batches(eval_set, preprocessing="fast"), all_batches(eval_set), strict=True):
        assert (fast.images.int() - reference.images.int()).abs().max() <= 2


def test_the_digest_is_the_contents_and_not_the_folders(eval_set: EvalSet, tmp_path: Path, class_folders: Path) -> None:
    folder = tmp_path / "clothes"
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert open_eval_set(moved).digest == eval_set.digest
    source = read_source(class_folders)
    relabelled = [Sample(s.key, s.name, s.image, (s.cls or 0) // 2) for s in source.samples]
    digests = {
        eval_set.digest,
        write_wds_eval(relabelled, tmp_path / "x", classnames=source.classes, templates=TEMPLATES).digest,
        write_wds_eval(source.samples, tmp_path / "y", classnames=["a", "b", "c"], templates=TEMPLATES).digest,
        write_wds_eval(source.samples[1:], tmp_path / "z", classnames=source.classes, templates=TEMPLATES).digest,
    }
    assert len(digests) == 4


def test_other_images_of_equal_size_are_another_set(eval_set: EvalSet, tmp_path: Path) -> None:
    """A result of the set before is out of date, whatever the dates of its files say."""
    tar = eval_set.tars[1]
    assert open_eval_set(tmp_path / "clothes").digest == eval_set.digest
    before = tar.path.stat()
    member = tar.samples[3].members["jpg"]
    with tar.path.open("r+b") as file:
        file.seek(member.offset + member.size - 40)
        file.write(bytes(8))
    os.utime(tar.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tar.path.stat().st_size == before.st_size
    assert open_eval_set(tmp_path / "clothes").digest != eval_set.digest


def test_writing_again_gives_the_same_bytes(eval_set: EvalSet, class_folders: Path, tmp_path: Path) -> None:
    source = read_source(class_folders)
    options: dict[str, Any] = {"classnames": source.classes, "templates": TEMPLATES, "samples_per_shard": 20}
    again = write_wds_eval(source.samples, tmp_path / "again", **options)
    for one, other in zip(eval_set.tars, again.tars, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
    with pytest.raises(ConfigError, match="again: not empty; give --force"):
        write_wds_eval(source.samples, tmp_path / "again", **options)
    fewer = write_wds_eval(source.samples[:5], tmp_path / "again", **options, force=True)
    assert sorted(path.name for path in (tmp_path / "again/test").iterdir()) == ["0.tar", "nshards.txt"]
    assert len(fewer) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "test/nshards.txt").unlink(), "no test/nshards.txt, so it is not a clip-benchmark set"),
        (lambda f: (f / "test/nshards.txt").write_text("many"), "'many' is not a number of shards"),
        (lambda f: (f / "test/nshards.txt").write_text("4"), r"3.tar: cannot be opened \(No such file"),
        (lambda f: (f / "test/nshards.txt").write_text("1"), "nshards.txt: says 1, and there is also 1.tar; write 3"),
        (lambda f: (f / "dataset_type.txt").write_text("multilabel"), "'multilabel' sets are not evaluated here"),
        (
            lambda f: (f / "classnames.txt").write_text("a\nb\n"),
            r"1.tar: s0000036.cls says '2', which is not a class of 2",
        ),
        (
            lambda f: (f / "dataset_type.txt").write_text("retrieval"),
            r"s0000000 has no .txt member \(it has cls, jpg\)",
        ),
        (lambda f: os.truncate(f / "test/1.tar", 4000), "1.tar: cut off"),
    ],
)
def test_opening_a_damaged_set_is_an_error_that_names_the_file(
    eval_set: EvalSet, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(tmp_path / "clothes")
    with pytest.raises(ConfigError, match=message):
        open_eval_set(tmp_path / "clothes")


def test_an_unreadable_image_stops_the_evaluation_by_name(eval_set: EvalSet) -> None:
    """An image that cannot be read stops the evaluation by name."""
    tar = eval_set.tars[1]
    member = tar.samples[3].members["jpg"]
    with tar.path.open("r+b") as file:
        file.seek(member.offset)
        file.write(bytes(600))
    for workers in (0, 2):
        with pytest.raises(ConfigError, match=r"test/1.tar: s0000023: not an image$"):
            all_batches(eval_set, workers=workers)


def test_own_test_images_become_an_evaluation_set(
    class_folders: Path, photo: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Own test images become a set with their classes or their captions."""
    report = pack_eval(class_folders, tmp_path / "classes", templates="simple")
    made = report.eval_set
    assert (made.kind, len(made), report.left_out) == ("classification", 53, [])
    assert (made.classnames, made.templates) == (("ankle boot", "hat", "t-shirt"), ("a photo of a {c}.",))
    for name in ("a.jpg", "b.jpg"):
        photo(1).save(tmp_path / name)
    (tmp_path / "t.csv").write_text("path,caption\na.jpg,one\na.jpg,two\nb.jpg,three\ngone.jpg,four\n")
    with pytest.raises(ConfigError, match="1 of 3 images are unreadable or missing"):
        pack_eval(tmp_path / "t.csv", tmp_path / "pairs")
    report = pack_eval(tmp_path / "t.csv", tmp_path / "pairs", max_unreadable=0.5)
    assert report.left_out == ["gone.jpg: no such file"]
    assert (report.eval_set.kind, report.eval_set.captions) == ("retrieval", (("one", "two"), ("three",)))


def test_samples_that_cannot_be_scored_are_not_written(odd_files: list[Sample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    bare = [Sample("x", "x.jpg", odd_files[0].image)]
    text = tmp_path / "x.jpg"
    text.write_text("no image")
    cases: list[tuple[list[Sample], dict[str, Any], str]] = [
        ([], {}, "no sample to write"),
        (bare, {"kind": "retrieval"}, "x.jpg: a retrieval set needs a caption"),
        (odd_files, {}, "needs class names and templates"),
        (odd_files, {"classnames": ["a"], "templates": ["{c}"]}, "b.jpeg: its class 1 is none of the 1"),
        (bare, {"classnames": ["a"], "templates": ["{c}"]}, "x.jpg: its class None is none of the 1"),
        ([Sample("x", "x.jpg", text, 0)], {"classnames": ["a"], "templates": ["{c}"]}, "x.jpg: not an image"),
    ]
    for samples, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            write_wds_eval(samples, out, **options)
        assert not (out / "test" / "nshards.txt").exists()
        shutil.rmtree(out, ignore_errors=True)
