"""The public datasets of `selora pack --dataset` as one table: the reader of each and its number of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pipeline.data.originals import loaders
from pipeline.data.originals.imagenet import (
    read_numbered_folders,
    read_train_100,
    read_val,
    read_val_100,
    read_wnid_folders,
)
from pipeline.data.originals.karpathy import Karpathy
from pipeline.data.originals.objectnet import read_objectnet
from pipeline.data.sources.sample import Source

_BROKEN_OFF = "an interrupted download or extraction"
_OTHER_SPLIT = "another split"


@dataclass(frozen=True)
class Split:
    """Images of a dataset outside its evaluation set; the fields are those of `Original`."""

    read: Callable[[Path], Source]
    images: int
    per_class: int | None = None
    known: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """One dataset as distributed by its authors.

    read: the user's folder -> its samples; ConfigError if it is not this dataset. images, classes, captions: their
    numbers; per_class: images per class if all classes have the same number. holds: required content of the folder.
    fewer, more: likely cause of too few or too many images; known: likely causes of certain counts. splits: other
    splits that are packed separately, "train" as training shards. bank: images among which K-NN searches, packed as
    split "train" of the evaluation set.
    """

    read: Callable[[Path], Source]
    images: int
    holds: str
    classes: int | None = None
    captions: int | None = None
    per_class: int | None = None
    fewer: str = _BROKEN_OFF
    more: str = _OTHER_SPLIT
    known: Mapping[int, str] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)
    bank: Split | None = None

    @property
    def is_retrieval(self) -> bool:
        return self.captions is not None

    def of(self, split: Split) -> Original:
        """The same dataset with another split's images."""
        return replace(self, **vars(split), splits={}, bank=None)

    def counted(self, *, images: int | None, classes: int | None = None, captions: int | None = None) -> Original:
        """The same dataset with other expected counts, if given."""
        return replace(
            self,
            images=images or self.images,
            classes=classes or self.classes,
            captions=captions or self.captions,
        )


_V2_VARIANTS = ("threshold0.7", "threshold-0.7", "top-images")

ORIGINALS: Mapping[str, Original] = {
    "imagenet": Original(
        read_val,
        50_000,
        "wnid folders (or val/ with them), or ILSVRC2012_val_*.JPEG with the devkit or Kaggle's LOC_val_solution.csv",
        classes=1000,
        per_class=50,
        known={1_281_167: "these are the training images", 100_000: "these are the test images, which have no labels"},
    ),
    "imagenet100": Original(
        read_val_100,
        5_000,
        "train/ and val/ of ImageNet-1K as `imagenet-train` and `imagenet` read them; 100 of the classes are taken",
        classes=100,
        per_class=50,
        known={126_689: "these are the training images; name the folder that holds train/ and val/"},
        bank=Split(read_train_100, 126_689, known={5_000: "these are the validation images"}),
    ),
    "imagenetv2": Original(
        partial(
            read_numbered_folders,
            places=("", "imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"),
            wrong=_V2_VARIANTS,
        ),
        10_000,
        "the folders 0 .. 999 of imagenetv2-matched-frequency.tar.gz",
        classes=1000,
        per_class=10,
    ),
    "imagenet-a": Original(
        partial(read_wnid_folders, places=("", "imagenet-a"), flag="A"),
        7_500,
        "the 200 wnid folders of imagenet-a.tar",
        classes=200,
    ),
    "imagenet-r": Original(
        partial(read_wnid_folders, places=("", "imagenet-r"), flag="R"),
        30_000,
        "the 200 wnid folders of imagenet-r.tar",
        classes=200,
    ),
    "imagenet_sketch": Original(
        partial(read_wnid_folders, places=("", "sketch", "ImageNet-Sketch", "imagenet-sketch")),
        50_889,
        "the 1000 wnid folders of ImageNet-Sketch.zip",
        classes=1000,
        known={50_000: "these are the validation images of ImageNet-1K"},
    ),
    "objectnet": Original(
        read_objectnet,
        18_574,
        "images/ and mappings/ of objectnet-1.0.zip, unpacked with its password",
        classes=113,
        fewer="ObjectNet was downloaded or unpacked in part, which lifts published scores by four points",
    ),
    "cifar10": Original(
        loaders.CIFAR10,
        10_000,
        "test_batch and batches.meta of cifar-10-python.tar.gz",
        classes=10,
        per_class=1000,
        known={50_000: "these are the training images"},
        splits={"train": Split(loaders.CIFAR10_TRAIN, 50_000, 5000)},
    ),
    "cifar100": Original(
        loaders.CIFAR100,
        10_000,
        "test and meta of cifar-100-python.tar.gz",
        classes=100,
        per_class=100,
        known={50_000: "these are the training images"},
        splits={"train": Split(loaders.CIFAR100_TRAIN, 50_000, 500)},
    ),
    "dtd": Original(
        loaders.dtd("test"),
        1_880,
        "dtd/dtd/images and dtd/dtd/labels: dtd-r1.0.1.tar.gz unpacked in ROOT/dtd",
        classes=47,
        per_class=40,
        known={5_640: "these are all three splits"},
        splits={name: Split(loaders.dtd(name), 1_880, 40) for name in ("train", "val")},
    ),
    "mnist": Original(
        loaders.MNIST,
        10_000,
        "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, unzipped, or MNIST/raw with them",
        classes=10,
        known={60_000: "these are the training images"},
    ),
    "sun397": Original(
        loaders.SUN397,
        108_754,
        "SUN397/ of SUN397.tar.gz",
        classes=397,
        fewer="an unofficial split, or an interrupted extraction; the benchmark takes all images",
        known={
            19_850: "this is one of the official partitions of 50 images a class",
            21_750: "this is a fifth of the images, as TFDS and ZSCL split them",
            21_751: "this is a fifth of the images, as TFDS and ZSCL split them",
            76_128: "this is the training part of TFDS's split",
        },
    ),
    "fgvc_aircraft": Original(
        loaders.AIRCRAFT,
        3_333,
        "fgvc-aircraft-2013b/data of fgvc-aircraft-2013b.tar.gz",
        classes=100,
        known={10_000: "these are all splits", 6_667: "these are the training and validation images"},
    ),
    "flowers": Original(
        loaders.flowers("test"),
        6_149,
        "flowers-102/ with jpg/ of 102flowers.tgz, imagelabels.mat and setid.mat",
        classes=102,
        known={1_020: "this is the training split, which some papers swap with the test split", 8_189: "all splits"},
        splits={
            name: Split(loaders.flowers(name), 1_020, 10, {6_149: "this is the test split"})
            for name in ("train", "val")
        },
    ),
    "food101": Original(
        loaders.food("test"),
        25_250,
        "food-101/ of food-101.tar.gz",
        classes=101,
        per_class=250,
        known={75_750: "these are the training images", 101_000: "these are all splits"},
        splits={"train": Split(loaders.food("train"), 75_750, 750)},
    ),
    "pets": Original(
        loaders.pets("test"),
        3_669,
        "oxford-iiit-pet/ with images/ and annotations/ of images.tar.gz and annotations.tar.gz",
        classes=37,
        known={3_680: "these are the trainval images"},
        splits={"train": Split(loaders.pets("trainval"), 3_680, known={3_669: "these are the test images"})},
    ),
    "stl10": Original(
        loaders.STL10,
        8_000,
        "class_names.txt, test_X.bin and test_y.bin of stl10_binary.tar.gz, or stl10_binary/ with them",
        classes=10,
        per_class=800,
        known={5_000: "these are the training images"},
    ),
    "mscoco": Original(
        Karpathy(("dataset_coco.json", "coco/dataset_coco.json"), ("", "images", "coco", "coco/images")),
        5_000,
        "dataset_coco.json (Karpathy's split) and val2014/",
        captions=25_010,
        fewer="images that are missing: the test images are in val2014.zip",
        known={40_504: "this is the whole of val2014", 1_000: "this is one of the five folds of 1,000"},
    ),
    "flickr30k": Original(
        Karpathy(
            ("dataset_flickr30k.json", "flickr30k_test_karpathy.txt", "flickr_annotations_30k.csv"),
            ("", "images", "flickr30k-images", "flickr30k_images", "Images"),
        ),
        1_000,
        "dataset_flickr30k.json, flickr30k_test_karpathy.txt or flickr_annotations_30k.csv, and flickr30k-images/",
        captions=5_000,
        known={31_014: "these are all splits", 31_783: "these are all images of Flickr30k"},
    ),
}
