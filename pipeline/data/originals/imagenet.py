"""ImageNet-1K and related sets in their distributed forms. Labels are positions in the sorted wnids."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.image_files import IMAGE_EXTENSIONS
from pipeline.data.sources.sample import Sample, Source, sample_key

_WNID = re.compile(r"n\d{8}")
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})$")
_VAL_PLACES = ("", "val", "ILSVRC2012_img_val", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val")
TRAIN_PLACES = ("", "train", "ILSVRC2012_img_train", "Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/train")
_DEVKIT_PLACES = ("", "data", "ILSVRC2012_devkit_t12/data", "devkit/data", "ILSVRC2012_devkit_t12")


def wnids(flag: str = "") -> tuple[str, ...]:
    """The sorted wnids of ImageNet-1K, or of a subset of it.

    The flag "A" selects ImageNet-A, "R" ImageNet-R (200 classes each), and "C" ImageNet-100.
    The lists come from timm (timm/data/_info), are the authors' own and agree with clip_benchmark's. There are several
    draws of ImageNet-100; this is the usual one, imagenet100.txt of github.com/HobbitLong/CMC (commit bc687a2).
    """
    lines = Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="ascii").splitlines()
    entries = [(line[:9], line[10:]) for line in lines]
    return tuple(wnid for wnid, flags in entries if flag in flags)


def read_wnid_folders(root: Path, places: Sequence[str], flag: str = "") -> Source:
    """Folders named by wnid, in the first of ``places`` below ``root`` that has such folders. Raises ConfigError."""
    return read_class_folders(_first_with_folders(root, places, _WNID), wnids(flag), wnids(flag))


def read_numbered_folders(root: Path, places: Sequence[str], wrong: Sequence[str]) -> Source:
    """ImageNet-V2's folders 0 .. 999: the number is the label. ``wrong``: names of its other variants."""
    folder = _first_with_folders(root, places, re.compile(r"\d{1,3}"))
    variant = next((word for word in wrong if word in str(folder.resolve())), None)
    if variant is not None:
        raise ConfigError(f"{folder}: is the variant {variant}, but the benchmark takes matched-frequency")
    return read_class_folders(folder, [str(number) for number in range(1000)], wnids())


def read_val(root: Path) -> Source:
    """ImageNet's validation images: in wnid folders, or flat with the devkit or with Kaggle's LOC_val_solution.csv."""
    flat = next((root / place for place in _VAL_PLACES if _has_val_images(root / place)), None)
    if flat is None:
        return read_wnid_folders(root, _VAL_PLACES)
    labels = _flat_labels(root, flat)
    samples = []
    for file in image_names(flat):
        found = _VAL_NUMBER.fullmatch(Path(file).stem)
        if found is not None:
            # The number is the line of the list, so a missing image does not shift labels.
            label = labels.get(int(found[1]))
            if label is None:
                raise ConfigError(f"{flat / file}: has no label; the lists end at {max(labels, default=0)}")
            samples.append(Sample(sample_key(file), file, flat / file, label))
    return Source("imagenet", root, samples, list(wnids()))


def read_val_100(root: Path) -> Source:
    """ImageNet's validation images of the classes in ImageNet-100; labels are positions in its sorted wnids."""
    source, chosen = read_val(root), wnids("C")
    label = {wnids().index(wnid): number for number, wnid in enumerate(chosen)}
    samples = [replace(sample, cls=label[sample.cls]) for sample in source.samples if sample.cls in label]
    return replace(source, samples=samples, classes=list(chosen))


def read_train_100(root: Path) -> Source:
    """The training images of ImageNet-100, from a tree of ImageNet or of only these 100 classes."""
    folder, chosen = _first_with_folders(root, TRAIN_PLACES, _WNID), wnids("C")
    return Source("class folders", folder, list(class_samples(folder, chosen)), list(chosen))


def read_class_folders(folder: Path, folders: Sequence[str], classes: Sequence[str]) -> Source:
    """Images in folders; label i is ``folders[i]``, named ``classes[i]``. Any other folder is an error."""
    strangers = sorted(set(subfolders(folder)) - set(folders))
    if strangers:
        listed = ", ".join(strangers[:5])
        raise ConfigError(
            f"{folder}: {len(strangers)} of its folders are no class of this dataset ({listed}); is it another one?"
        )
    return Source("class folders", folder, list(class_samples(folder, folders)), list(classes))


def class_samples(folder: Path, folders: Sequence[str]) -> Iterator[Sample]:
    """The images of these folders, each sorted; those of the i-th folder have label i. A folder may be missing."""
    for label, below in enumerate(folders):
        for file in image_names(folder / below) if (folder / below).is_dir() else ():
            name = f"{below}/{file}"
            yield Sample(sample_key(name), name, folder / name, label)


def subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_names(folder: Path) -> list[str]:
    """The files of a folder with names of images, sorted."""
    names = (entry.name for entry in os.scandir(folder))
    return sorted(
        name for name in names if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
    )


def _first_with_folders(root: Path, places: Sequence[str], pattern: re.Pattern[str]) -> Path:
    for place in places:
        folder = root / place
        if folder.is_dir() and any(pattern.fullmatch(name) for name in subfolders(folder)):
            return folder
    looked = ", ".join(str(root / place) for place in places)
    raise ConfigError(f"{root}: no class folders ({pattern.pattern}) in {looked}")


def _has_val_images(folder: Path) -> bool:
    return folder.is_dir() and any(_VAL_NUMBER.fullmatch(Path(entry.name).stem) for entry in os.scandir(folder))


def _flat_labels(root: Path, flat: Path) -> dict[int, int]:
    """{number of the image, from 1: label}."""
    for place in (root, root.parent, flat, flat.parent):
        for below in _DEVKIT_PLACES:
            if (place / below / "ILSVRC2012_validation_ground_truth.txt").is_file():
                return _devkit_labels(place / below)
        if (place / "LOC_val_solution.csv").is_file():
            return _kaggle_labels(place / "LOC_val_solution.csv")
    raise ConfigError(
        f"{flat}: flat validation images need their labels: unpack ILSVRC2012_devkit_t12.tar.gz into {root} "
        "(data/ILSVRC2012_validation_ground_truth.txt and data/meta.mat), or put Kaggle's LOC_val_solution.csv there"
    )


def _devkit_labels(folder: Path) -> dict[int, int]:
    """Labels from the devkit, which numbers classes in its own order (ILSVRC2012_ID); meta.mat has the wnid of each."""
    from scipy.io import loadmat

    if not (folder / "meta.mat").is_file():
        raise ConfigError(f"{folder}: no meta.mat next to ILSVRC2012_validation_ground_truth.txt")
    synsets = loadmat(folder / "meta.mat", squeeze_me=True)["synsets"]
    place = {wnid: label for label, wnid in enumerate(wnids())}
    label_of = {
        int(synset["ILSVRC2012_ID"]): place[str(synset["WNID"])] for synset in synsets if str(synset["WNID"]) in place
    }
    ids = (folder / "ILSVRC2012_validation_ground_truth.txt").read_text(encoding="ascii").split()
    unknown = [line for line, text in enumerate(ids, 1) if not text.isdecimal() or int(text) not in label_of]
    if unknown:
        raise ConfigError(
            f"{folder}/ILSVRC2012_validation_ground_truth.txt:{unknown[0]}: {ids[unknown[0] - 1]!r} is not a class of "
            "ImageNet-1K in meta.mat"
        )
    return {number: label_of[int(text)] for number, text in enumerate(ids, 1)}


def _kaggle_labels(file: Path) -> dict[int, int]:
    """Rows "ILSVRC2012_val_00000001,n01751748 111 108 380 372 ..": the first word is the class."""
    place = {wnid: label for label, wnid in enumerate(wnids())}
    labels: dict[int, int] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            found = _VAL_NUMBER.fullmatch(row.get("ImageId") or "")
            wnid = (row.get("PredictionString") or "").partition(" ")[0]
            if found is None or wnid not in place:
                raise ConfigError(f"{file}: {row} is not 'ILSVRC2012_val_NUMBER,WNID ..'")
            labels[int(found[1])] = place[wnid]
    return labels
