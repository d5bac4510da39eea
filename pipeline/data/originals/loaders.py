"""Datasets with a loader in torchvision, which lists the images and their labels.

Label orders are those of the datasets and of the public wds sets: the name files of CIFAR and STL, the digits, DTD and
Food by sorted name, SUN's ClassName.txt, Aircraft's variants.txt, and the numbers of Flowers and Pets minus one.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from pipeline.config import ConfigError
from pipeline.data.sources.account import LeftOut
from pipeline.data.sources.sample import Sample, Source, sample_key
from pipeline.prompts import readable_name

_FAULTS = (RuntimeError, OSError, ValueError, KeyError, IndexError, EOFError, pickle.UnpicklingError)


@dataclass(frozen=True)
class ArrayImage:
    """An image that its dataset stores as an array. It becomes lossless webp, as in the public sets."""

    dataset: Sequence[tuple[Image.Image, int]]
    number: int
    suffix: str = ".webp"

    def read_bytes(self) -> bytes:
        buffer = io.BytesIO()
        self.dataset[self.number][0].convert("RGB").save(buffer, "WEBP", lossless=True)
        return buffer.getvalue()


def array_samples(dataset: Any) -> Iterator[Sample]:
    """Samples of a dataset of (image, label)."""
    for number in range(len(dataset)):
        name = f"{number:07d}"
        yield Sample(name, name, ArrayImage(dataset, number), int(dataset[number][1]))


def file_samples(dataset: Any) -> Iterator[Sample]:
    """Samples of a dataset of (path, label), sorted by path because some loaders list files in the disk's order."""
    listed = sorted((str(path), int(label)) for path, label in (dataset[i] for i in range(len(dataset))))
    for path, label in listed:
        name = "/".join(Path(path).parts[-2:])
        yield Sample(sample_key(path), name, Path(path), label)


@dataclass(frozen=True)
class Loader:
    """Reads a dataset below the user's folder.

    ``open`` gets the first of ``places`` that holds ``anchor``. ``md5``: checksums of its small files, verified before
    any is read, because some of them are pickles.
    """

    open: Callable[[Path], Any]
    samples: Callable[[Any], Iterator[Sample]]
    anchor: str
    places: tuple[str, ...]
    md5: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, root: Path) -> Source:
        """Raises ConfigError if files are missing or are not the authors'."""
        folder = next((root / place for place in self.places if (root / place / self.anchor).exists()), None)
        if folder is None:
            raise ConfigError(f"{root}: no {self.anchor} in {', '.join(str(root / place) for place in self.places)}")
        for name, wanted in self.md5.items():
            _check_md5(folder / name, wanted)
        try:
            dataset = self.open(folder)
            listed = list(self.samples(dataset))
        except _FAULTS as error:
            raise ConfigError(f"{folder}: damaged or incomplete ({type(error).__name__}: {error})") from error
        there = [sample for sample in listed if not isinstance(sample.image, Path) or sample.image.is_file()]
        missing = [
            LeftOut(sample.name, "no such file")
            for sample in listed
            if isinstance(sample.image, Path) and not sample.image.is_file()
        ]
        return Source("torchvision", root, there, [readable_name(name) for name in dataset.classes], missing)


def _check_md5(file: Path, wanted: str) -> None:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; unpack the whole archive")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    if found != wanted:
        raise ConfigError(f"{file}: damaged or not the authors' file (md5 {found}, not {wanted}); download it again")


# torchvision also requires the training files and their checksums; the table has only the necessary ones.
class _Cifar10(datasets.CIFAR10):
    base_folder = ""
    train_list: Any = ()
    test_list: Any = (("test_batch", None),)
    meta: Any = {"filename": "batches.meta", "key": "label_names", "md5": None}  # noqa: RUF012


class _Cifar100(datasets.CIFAR100):
    base_folder = ""
    train_list: Any = ()
    test_list: Any = (("test", None),)
    meta: Any = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012


class _Cifar10Train(_Cifar10):
    train_list: Any = tuple((name, None) for name, _ in datasets.CIFAR10.train_list)
    test_list: Any = ()


class _Cifar100Train(_Cifar100):
    train_list: Any = tuple((name, None) for name, _ in datasets.CIFAR100.train_list)
    test_list: Any = ()


class _Stl10(datasets.STL10):
    base_folder = ""
    train_list: Any = ()
    test_list: Any = (("test_X.bin", None), ("test_y.bin", None))


class _Mnist(datasets.MNIST):
    resources: Any = datasets.MNIST.resources[2:]

    @property
    def raw_folder(self) -> str:
        return str(self.root)


class _Flowers(datasets.Flowers102):
    _file_dict: Any = {"label": ("imagelabels.mat", None), "setid": ("setid.mat", None)}  # noqa: RUF012


class _Pets(datasets.OxfordIIITPet):
    def __getitem__(self, idx: int) -> tuple[Any, Any]:
        return self._images[idx], self._labels[idx]


def _as_path(path: str | Path) -> Any:
    """The loader of images, which returns only their path."""
    return path


_ABOVE = ("", "..", "../..")

CIFAR10 = Loader(
    lambda root: _Cifar10(root, train=False),
    array_samples,
    "test_batch",
    ("", "cifar-10-batches-py"),
    {"test_batch": "40351d587109b95175f43aff81a1287e", "batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
)
CIFAR100 = Loader(
    lambda root: _Cifar100(root, train=False),
    array_samples,
    "test",
    ("", "cifar-100-python"),
    {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc", "meta": "7973b15100ade9c7d40fb424638fde48"},
)
CIFAR10_TRAIN = Loader(
    lambda root: _Cifar10Train(root, train=True),
    array_samples,
    "data_batch_1",
    ("", "cifar-10-batches-py"),
    {**dict(datasets.CIFAR10.train_list), "batches.meta": CIFAR10.md5["batches.meta"]},
)
CIFAR100_TRAIN = Loader(
    lambda root: _Cifar100Train(root, train=True),
    array_samples,
    "train",
    ("", "cifar-100-python"),
    {**dict(datasets.CIFAR100.train_list), "meta": CIFAR100.md5["meta"]},
)
STL10 = Loader(
    lambda root: _Stl10(root, split="test"),
    array_samples,
    "class_names.txt",
    ("", "stl10_binary"),
    {"test_X.bin": "7f263ba9f9e0b06b93213547f721ac82", "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e"},
)
MNIST = Loader(
    lambda root: _Mnist(root, train=False), array_samples, "t10k-images-idx3-ubyte", ("", "MNIST/raw", "raw")
)
SUN397 = Loader(lambda root: datasets.SUN397(root, loader=_as_path), file_samples, "SUN397/ClassName.txt", _ABOVE)
AIRCRAFT = Loader(
    lambda root: datasets.FGVCAircraft(root, split="test", loader=_as_path),
    file_samples,
    "fgvc-aircraft-2013b/data/images_variant_test.txt",
    _ABOVE,
)


def dtd(split: str) -> Loader:
    """The first of DTD's ten splits; "train", "val" or "test"."""
    anchor = f"dtd/dtd/labels/{split}1.txt"
    return Loader(lambda root: datasets.DTD(root, split=split, loader=_as_path), file_samples, anchor, _ABOVE)


def flowers(split: str) -> Loader:
    """ "train", "val" or "test"."""
    return Loader(
        lambda root: _Flowers(root, split=split, loader=_as_path),
        file_samples,
        "flowers-102/setid.mat",
        _ABOVE,
        {
            "flowers-102/imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
            "flowers-102/setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
        },
    )


def food(split: str) -> Loader:
    """ "train" or "test"."""
    anchor = f"food-101/meta/{split}.json"
    return Loader(lambda root: datasets.Food101(root, split=split, loader=_as_path), file_samples, anchor, _ABOVE)


def pets(split: str) -> Loader:
    """ "trainval" or "test"."""
    anchor = f"oxford-iiit-pet/annotations/{split}.txt"
    return Loader(lambda root: _Pets(root, split=split), file_samples, anchor, _ABOVE)
