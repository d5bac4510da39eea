"""Public datasets as distributed by their authors -> evaluation sets; damaged ones are refused with the cause."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from original_trees import (
    MAKERS,
    NAMES,
    SPLIT_MAKERS,
    WNIDS,
    Made,
    folders,
    jpeg,
    make_aircraft,
    make_cifar10,
    make_cifar100,
    make_coco,
    make_dtd,
    make_flickr_txt,
    make_flowers,
    make_food,
    make_imagenet,
    make_imagenet100,
    make_mnist,
    make_objectnet,
    make_pets,
    make_stl10,
    make_sun397,
    make_v2,
)
from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.eval.wds_layout import EvalSet, open_eval_set, write_wds_eval
from pipeline.data.originals.convert import convert, original, read_original
from pipeline.data.originals.imagenet import wnids
from pipeline.data.originals.loaders import Loader
from pipeline.data.originals.table import ORIGINALS
from pipeline.data.sources.sample import Sample


def small(name: str, made: Made, split: str = "test") -> Any:
    """The row of a dataset with the counts of a small tree, and without the checksums of the authors' files."""
    row = original(name, split).counted(images=len(made.captions or made.labels))
    row = row if row.bank is None else replace(row, bank=replace(row.bank, images=200))
    if made.captions is not None:
        return replace(row, captions=sum(len(texts) for texts in made.captions))
    per_class = None if row.per_class is None else len(made.labels) // (row.classes or 1)
    read = replace(row.read, md5={}) if isinstance(row.read, Loader) else row.read
    return replace(row, per_class=per_class, read=read)


def images_of(made: EvalSet) -> list[tuple[str, bytes]]:
    found = []
    for tar, number in made.places:
        members = made.tars[tar].samples[number].members
        ext = next(ext for ext in members if ext not in ("cls", "txt"))
        found.append((ext, made.tars[tar].read(number, ext)))
    return found


@pytest.mark.parametrize(("name", "make"), MAKERS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(MAKERS)])
def test_labels_bytes_and_counts_are_the_originals(name: str, make: Callable[[Path], Made], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    made = make(root)
    found = convert(small(name, made), root, tmp_path / "out", wnid_names=NAMES, workers=2)
    assert list(found.labels) == made.labels
    assert found.captions == tuple(tuple(t.replace("\n", "\\n") for t in texts) for texts in made.captions or ())
    images = images_of(found)
    if made.files is not None:
        assert [data for _, data in images] == made.files
        assert {ext for ext, _ in images} == ({"png"} if name == "objectnet" else {"jpg"})
    else:
        assert {ext for ext, _ in images} == {"webp"}
        for (_, data), pixels in zip(images, made.pixels or (), strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), pixels)
    if made.names is not None:
        assert found.classnames is not None and len(found.classnames) == ORIGINALS[name].classes
        assert list(found.classnames[: len(made.names)]) == made.names


def test_every_dataset_of_the_table_has_a_tree_here() -> None:
    assert {name for name, _ in MAKERS} == set(ORIGINALS)
    assert {(name, split) for name, split, _ in SPLIT_MAKERS} == {
        (name, split) for name, row in ORIGINALS.items() for split in row.splits
    }


@pytest.mark.parametrize(("name", "split", "make"), SPLIT_MAKERS, ids=[f"{n}-{s}" for n, s, _ in SPLIT_MAKERS])
def test_another_split_is_its_own_images(name: str, split: str, make: Callable[[Path], Made], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    made = make(root)
    row = small(name, made, split)
    found = read_original(row, root)
    assert [sample.cls for sample in found.samples] == made.labels
    assert found.classes is not None and found.classes[: len(made.names or ())] == made.names
    for sample, data in zip(found.samples, made.files or (), strict=bool(made.files)):
        assert sample.image.read_bytes() == data
    for sample, pixels in zip(found.samples, made.pixels or (), strict=bool(made.pixels)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image.read_bytes()))), pixels)
    with pytest.raises(ConfigError, match=r"images: \d+ found, 7 expected\n"):
        read_original(replace(row, images=7), root)


def test_the_bank_is_the_training_images_of_the_same_classes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    made = make_imagenet100(root)
    row = small("imagenet100", made)
    convert(row, root, tmp_path / "out", wnid_names=NAMES, workers=2)
    bank = open_eval_set(tmp_path / "out", split="train")
    assert list(bank.labels) == [label for label in range(100) for _ in range(2)]
    expected = [(root / f"train/{wnid}/{wnid}_{n}.JPEG").read_bytes() for wnid in wnids("C") for n in range(2)]
    assert [data for _, data in images_of(bank)] == expected
    assert bank.classnames == open_eval_set(tmp_path / "out").classnames
    (root / f"train/{wnids('C')[0]}/{wnids('C')[0]}_1.JPEG").unlink()
    with pytest.raises(ConfigError, match=r"train: not the whole dataset\n  images: 199 found, 200 expected"):
        convert(row, root, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ConfigError, match=r"images: 199 found, 100 expected.*\n.*\nlikely: these are the training"):
        convert(replace(row, known={199: "these are the training images"}), root / "train", tmp_path / "again")


def test_imagenet_100_comes_from_its_own_classes_alone(tmp_path: Path) -> None:
    """ImageNet 100 comes from flat validation images and from its classes alone."""
    flat, chosen = make_imagenet(tmp_path / "flat"), wnids("C")
    row = replace(small("imagenet100", Made(list(range(100)))), bank=None)
    found = read_original(row, tmp_path / "flat")
    labels = [chosen.index(WNIDS[label]) for label in flat.labels if WNIDS[label] in chosen]
    assert [sample.cls for sample in found.samples] == labels
    alone = folders(tmp_path / "alone/val", chosen)
    assert [sample.cls for sample in read_original(row, tmp_path / "alone").samples] == alone.labels


def test_a_split_that_is_not_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match="--split: 'valid' of flowers is not packed, only test, train, val"):
        original("flowers", "valid")


def test_the_lists_of_wnids_are_whole() -> None:
    assert [len(wnids(flag)) for flag in ("", "A", "R", "C")] == [1000, 200, 200, 100]
    assert list(WNIDS) == sorted(set(WNIDS))
    assert set(wnids("A")) | set(wnids("R")) | set(wnids("C")) < set(WNIDS)


def cut_pickle(root: Path) -> None:
    file = root / "cifar-10-batches-py/test_batch"
    file.write_bytes(file.read_bytes()[:1000])


def without_class(root: Path) -> None:
    for file in (root / "val" / WNIDS[7]).iterdir():
        file.unlink()


def with_a_second_split(root: Path) -> None:
    file = root / "dtd/dtd/labels/test1.txt"
    file.write_text(file.read_text() + "banded/a_1.jpg\nbanded/a_2.jpg\n")
    for n in (1, 2):
        jpeg(n, root / f"dtd/dtd/images/banded/a_{n}.jpg")


def rename(old: str, new: str) -> Callable[[Path], Any]:
    return lambda root: (root / old).rename(root / new)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).unlink()


def half(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-300])


BREAKS: list[tuple[str, Callable[[Path], Made], Callable[[Path], Any], str]] = [
    (
        "imagenet",
        MAKERS[2][1],
        without_class,
        r"images: 999 found, 1000 expected\n.*classes: 999 found.*none of n01514668\n",
    ),
    ("imagenet", make_imagenet, rename("ILSVRC2012_devkit_t12", "x"), r"need their labels: unpack ILSVRC2012_devkit"),
    ("imagenet", make_imagenet, remove("ILSVRC2012_devkit_t12/data/meta.mat"), r"no meta.mat next to"),
    (
        "imagenet",
        make_imagenet,
        half("ILSVRC2012_val_00000009.JPEG"),
        r"none may be left out\n.*val_00000009.JPEG: cannot",
    ),
    ("imagenetv2", make_v2, rename("imagenetv2-matched-frequency-format-val", "x"), r"no class folders"),
    (
        "imagenet-a",
        lambda root: folders(root, wnids("R"), 2),
        lambda root: None,
        r"114 of its folders are no class of this",
    ),
    (
        "objectnet",
        make_objectnet,
        rename("objectnet-1.0/images/folder_007", "x"),
        r"312 of 313 class folders.*folder_007",
    ),
    (
        "objectnet",
        make_objectnet,
        remove("objectnet-1.0/images/folder_071/a.png"),
        r"likely: ObjectNet was downloaded .* in part",
    ),
    ("objectnet", make_objectnet, rename("objectnet-1.0/mappings", "x"), r"no mappings/folder_to_objectnet_label.json"),
    ("cifar10", make_cifar10, cut_pickle, r"cifar-10-batches-py: damaged or incomplete \(UnpicklingError"),
    ("cifar100", make_cifar100, remove("cifar-100-python/meta"), r"cifar-100-python: damaged or incomplete"),
    (
        "dtd",
        make_dtd,
        with_a_second_split,
        r"images: 49 found, 47 expected\n.*1 expected, but banded 3\nlikely: another split",
    ),
    ("mnist", make_mnist, remove("MNIST/raw/t10k-labels-idx1-ubyte"), r"damaged or incomplete"),
    ("mnist", make_mnist, half("MNIST/raw/t10k-images-idx3-ubyte"), r"damaged or incomplete"),
    (
        "sun397",
        make_sun397,
        remove("SUN397/a/abbey/sun_0abc.jpg"),
        r"396 found, 397 expected\n.*likely: an unofficial split",
    ),
    (
        "fgvc_aircraft",
        make_aircraft,
        remove("fgvc-aircraft-2013b/data/images/0000007.jpg"),
        r"1 are listed but missing",
    ),
    ("flowers", make_flowers, remove("flowers-102/setid.mat"), r"no flowers-102/setid.mat in"),
    ("food101", make_food, remove("food-101/images/dish_00/100.jpg"), r"missing: dish_00/100.jpg\n"),
    ("pets", make_pets, remove("oxford-iiit-pet/images/Breed_00_1.jpg"), r"36 found, 37 expected"),
    ("stl10", make_stl10, half("stl10_binary/test_X.bin"), r"stl10_binary: damaged or incomplete \(ValueError"),
    (
        "mscoco",
        make_coco,
        remove("val2014/COCO_2.jpg"),
        r"missing: val2014/COCO_2.jpg\n.*captions: 5 found, 11 .*val2014.zip",
    ),
    (
        "mscoco",
        make_coco,
        lambda root: (root / "dataset_coco.json").write_text("[]"),
        r"dataset_coco.json: not Karpathy",
    ),
    ("flickr30k", make_flickr_txt, remove("flickr30k_test_karpathy.txt"), r"none of dataset_flickr30k.json"),
]


@pytest.mark.parametrize(
    ("name", "make", "damage", "message"), BREAKS, ids=[f"{n}-{entry[0]}" for n, entry in enumerate(BREAKS)]
)
def test_a_broken_tree_is_refused_with_its_cause(
    name: str, make: Callable[[Path], Made], damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    """A broken tree is refused with its cause and nothing is written."""
    root = tmp_path / "root"
    root.mkdir()
    made = make(root)
    damage(root)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        convert(small(name, made), root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_counts_that_tell_name_what_they_are(tmp_path: Path) -> None:
    make_flowers(tmp_path)
    row = replace(small("flowers", Made(list(range(102)))), images=6149, known={102: "this is the training split"})
    with pytest.raises(ConfigError, match=r"images: 102 found, 6149 expected\nlikely: this is the training split\n"):
        convert(row, tmp_path, tmp_path / "out")


def test_foreign_files_are_refused_before_unpickling(tmp_path: Path) -> None:
    """Files that are not the authors' are refused before they are unpickled."""
    make_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path) + b"/x'\ntR.")
    with pytest.raises(ConfigError, match=r"test_batch: damaged or not the authors' file \(md5 .*not 40351d58"):
        convert(original("cifar10"), tmp_path, tmp_path / "out")
    assert not (tmp_path / "x").exists()


def test_another_variant_of_v2_is_refused(tmp_path: Path) -> None:
    make_v2(tmp_path)
    (tmp_path / "imagenetv2-matched-frequency-format-val").rename(tmp_path / "imagenetv2-top-images-format-val")
    with pytest.raises(ConfigError, match="is the variant top-images, but the benchmark takes matched-frequency"):
        convert(original("imagenetv2"), tmp_path / "imagenetv2-top-images-format-val", tmp_path / "out")


def test_unknown_names_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dataset: 'cifar' is not known; there are imagenet, imagenet100"):
        original("cifar")
    with pytest.raises(ConfigError, match="x: no such folder; it must hold SUN397/"):
        convert(original("sun397"), tmp_path / "x", tmp_path / "out")
    assert original("sun397").counted(images=5).images == 5


def test_a_shard_is_closed_before_it_grows_too_large(tmp_path: Path) -> None:
    source = folders(tmp_path / "source", ("a", "b"), 6)
    samples = [Sample(path.stem, path.name, path, 0) for path in sorted((tmp_path / "source").rglob("*.JPEG"))]
    options: dict[str, Any] = {"classnames": ["a"], "templates": ["{c}"], "as_found": True}
    largest = max(len(data) for data in source.files or ())
    made = write_wds_eval(samples, tmp_path / "out", bytes_per_shard=2 * largest, **options)
    assert [len(tar) for tar in made.tars] == [2] * 6
    made = write_wds_eval(samples, tmp_path / "one", bytes_per_shard=1, **options)
    assert [len(tar) for tar in made.tars] == [1] * 12
