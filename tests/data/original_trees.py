"""Small trees of the public datasets, as distributed by their authors."""

from __future__ import annotations

import csv
import io
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from pipeline.data.originals.imagenet import wnids

WNIDS = wnids()


@dataclass
class Made:
    """What a maker put into a tree: label (or captions) and, for files, the bytes of each image, in the set's order."""

    labels: list[int]
    files: list[bytes] | None = None
    pixels: list[np.ndarray[Any, Any]] | None = None
    captions: list[tuple[str, ...]] | None = None
    names: list[str] | None = None  # of the first classes, by label


@cache
def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    if seed % 3 == 0:
        exif[0x0112] = 6
    Image.fromarray(pixels).resize((12, 9)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def jpeg(seed: int, path: Path) -> bytes:
    """A small photograph; one in three is rotated by its EXIF orientation, as some of the originals are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed))
    return encoded(seed)


def folders(root: Path, names: list[str] | tuple[str, ...], each: int = 1, file: str = "{n}.JPEG") -> Made:
    files = [jpeg(i * each + n, root / name / file.format(n=n)) for i, name in enumerate(names) for n in range(each)]
    return Made([i for i in range(len(names)) for _ in range(each)], files)


def make_imagenet(root: Path) -> Made:
    """Flat, with the devkit, whose classes are numbered in another order than the sorted wnids."""
    labels = [int(i) for i in np.random.default_rng(0).permutation(1000)]
    files = [jpeg(n, root / f"ILSVRC2012_val_{n + 1:08d}.JPEG") for n in range(1000)]
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    id_of = {label: 1000 - label for label in range(1000)}
    synsets = np.zeros(1001, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    for label, wnid in enumerate(WNIDS):
        synsets[label] = (id_of[label], wnid, "words", 0)
    synsets[1000] = (1001, "n00001740", "entity", 2)  # an inner node of the tree, as the real file has
    savemat(data / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{id_of[label]}\n" for label in labels)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return Made(labels, files, names=["tench"])


def make_imagenet_kaggle(root: Path) -> Made:
    made = make_imagenet(root)
    (root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").unlink()
    rows = [f"ILSVRC2012_val_{n + 1:08d},{WNIDS[label]} 1 2 30 40 " for n, label in enumerate(made.labels)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)) + "\n")
    return made


def make_v2(root: Path) -> Made:
    names = [str(n) for n in range(1000)]
    return replace(folders(root / "imagenetv2-matched-frequency-format-val", names, file="{n}.jpeg"), names=["tench"])


def make_objectnet(root: Path) -> Made:
    """313 folders of png, 113 of them known to ImageNet. Folders sort otherwise than their names do."""
    base = root / "objectnet-1.0"
    name_of = {f"folder_{(n * 71) % 313:03d}": f"Thing {n}" for n in range(313)}
    overlap = {f"Thing {n}": "tench" for n in range(113)}
    (base / "mappings").mkdir(parents=True)
    (base / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(name_of))
    (base / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    made = Made([], [], names=[])
    for folder in sorted(name_of):
        (base / "images" / folder).mkdir(parents=True)
        image = Image.new("RGB", (8, 8), (len(made.labels), 2, 3))
        image.save(base / "images" / folder / "a.png")
        if name_of[folder] in overlap:
            made.labels.append(len(made.labels))
            made.files.append((base / "images" / folder / "a.png").read_bytes())  # type: ignore[union-attr]
            made.names.append(name_of[folder].lower())  # type: ignore[union-attr]
    return made


def make_imagenet100(root: Path) -> Made:
    """train/ and val/ with the folders of all 1000 classes, of which a hundred are taken. The bank is in train/."""
    chosen, files = wnids("C"), []
    for n, wnid in enumerate(WNIDS):
        data = jpeg(n, root / f"val/{wnid}/ILSVRC2012_val_{n + 1:08d}.JPEG")
        for i in range(2):
            jpeg(1000 + 2 * n + i, root / f"train/{wnid}/{wnid}_{i}.JPEG")
        if wnid in chosen:
            files.append(data)
    return Made(list(range(100)), files, names=["robin"])


def make_cifar(root: Path, folder: str, file: str, meta: str, key: str, label_key: str, classes: list[str]) -> Made:
    data = np.random.default_rng(1).integers(0, 256, (2 * len(classes), 3072), dtype=np.uint8)
    labels = list(range(len(classes))) * 2
    (root / folder).mkdir(parents=True)
    batch = {"data": data, label_key: labels, "filenames": ["x.png"] * len(labels), "batch_label": "testing batch"}
    (root / folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    (root / folder / meta).write_bytes(pickle.dumps({key: classes}, protocol=2))
    pixels = list(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Made(labels, pixels=pixels, names=[name.replace("_", " ") for name in classes])


def make_cifar10(root: Path) -> Made:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return make_cifar(root, "cifar-10-batches-py", "test_batch", "batches.meta", "label_names", "labels", names)


def make_cifar100(root: Path) -> Made:
    names = ["apple", "aquarium_fish", *(f"thing_{n}" for n in range(98))]
    return make_cifar(root, "cifar-100-python", "test", "meta", "fine_label_names", "fine_labels", names)


def make_stl10(root: Path) -> Made:
    base = root / "stl10_binary"
    base.mkdir()
    # The bins are column-major, and their labels start at 1.
    data = np.random.default_rng(2).integers(0, 256, (10, 3, 96, 96), dtype=np.uint8)
    data.tofile(base / "test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(base / "test_y.bin")
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (base / "class_names.txt").write_text("\n".join(names) + "\n")
    return Made(list(range(10)), pixels=list(data.transpose(0, 3, 2, 1)), names=names)


def make_mnist(root: Path) -> Made:
    base = root / "MNIST/raw"
    base.mkdir(parents=True)
    data = np.random.default_rng(3).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = [n % 10 for n in range(20)]
    (base / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 20, 28, 28) + data.tobytes())
    (base / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 20) + bytes(labels))
    return Made(labels, pixels=[np.repeat(image[:, :, None], 3, 2) for image in data], names=["0 - zero"])


def make_dtd(root: Path) -> Made:
    names = ["banded", "polka-dotted", *(f"texture{n:02d}" for n in range(45))]
    base = root / "dtd/dtd"
    made = folders(base / "images", names, file="a_{n}.jpg")
    (base / "labels").mkdir()
    (base / "labels/test1.txt").write_text("".join(f"{name}/a_0.jpg\n" for name in names))
    return replace(made, names=["banded", "polka-dotted"])


def make_sun397(root: Path) -> Made:
    names = ["a/abbey", "a/airplane_cabin", "c/church/indoor", *(f"z/zone{n:03d}" for n in range(394))]
    made = folders(root / "SUN397", names, file="sun_{n}abc.jpg")
    (root / "SUN397/ClassName.txt").write_text("".join(f"/{name}\n" for name in names))
    return replace(made, names=["abbey", "airplane cabin", "church/indoor"])


def make_aircraft(root: Path) -> Made:
    data = root / "fgvc-aircraft-2013b/data"
    names = ["707-320", "F/A-18", *(f"Kind {n:02d}" for n in range(98))]
    files = [jpeg(n, data / f"images/{n:07d}.jpg") for n in range(100)]
    (data / "variants.txt").write_text("\n".join(names) + "\n")
    lines = [f"{n:07d} {name}\n" for n, name in enumerate(names)]
    (data / "images_variant_test.txt").write_text("".join(lines))
    return Made(list(range(100)), files, names=names[:2])


def make_flowers(root: Path) -> Made:
    base = root / "flowers-102"
    files = [jpeg(n, base / f"jpg/image_{n + 1:05d}.jpg") for n in range(204)]
    labels = [n % 102 + 1 for n in range(204)]
    savemat(base / "imagelabels.mat", {"labels": np.array([labels])})
    ids = {"trnid": [1, 2], "valid": [3, 4], "tstid": list(range(103, 205))}
    savemat(base / "setid.mat", {key: np.array([value]) for key, value in ids.items()})
    return Made(list(range(102)), files[102:], names=["pink primrose"])


def make_food(root: Path) -> Made:
    base = root / "food-101"
    names = ["apple_pie", "baby_back_ribs", *(f"dish_{n:02d}" for n in range(99))]
    made = folders(base / "images", names, file="10{n}.jpg")
    (base / "meta").mkdir()
    (base / "meta/test.json").write_text(json.dumps({name: [f"{name}/100"] for name in reversed(names)}))
    return replace(made, names=["apple pie", "baby back ribs"])


def make_pets(root: Path) -> Made:
    base = root / "oxford-iiit-pet"
    # Upper case names are cats, and the numbers follow neither case.
    names = ["Abyssinian", "american_bulldog", *(f"Breed_{n:02d}" for n in range(35))]
    files = {name: jpeg(n, base / f"images/{name}_1.jpg") for n, name in enumerate(names)}
    (base / "annotations").mkdir()
    lines = [f"{name}_1 {n + 1} 1 1\n" for n, name in enumerate(names)]
    (base / "annotations/test.txt").write_text("".join(lines))
    ordered = sorted(names)
    made = Made([names.index(name) for name in ordered], [files[name] for name in ordered])
    return replace(made, names=["Abyssinian", "American Bulldog"])


CAPTIONS = [("A dog, running.", "Two\nlines ", "a", "b", "c"), ("Ein Hund", "d", "e", "f", "g", "h")]


def make_coco(root: Path) -> Made:
    images = []
    for n, (split, folder) in enumerate((("test", "val2014"), ("restval", "val2014"), ("test", "val2014"))):
        sentences = [{"raw": text, "tokens": []} for text in CAPTIONS[n // 2]]
        images.append({"filepath": folder, "filename": f"COCO_{n}.jpg", "split": split, "sentences": sentences})
    files = [jpeg(n, root / f"val2014/COCO_{n}.jpg") for n in range(3)]
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return Made([], [files[0], files[2]], captions=list(CAPTIONS))


def make_flickr_json(root: Path) -> Made:
    made = make_coco(root)
    content = json.loads((root / "dataset_coco.json").read_text())
    for image in content["images"]:
        del image["filepath"]
    (root / "dataset_flickr30k.json").write_text(json.dumps(content))
    (root / "val2014").rename(root / "flickr30k-images")
    return made


def make_flickr_txt(root: Path) -> Made:
    files = [jpeg(n, root / f"images/{n}.jpg") for n in range(2)]
    captions = [("A dog, running.", "b"), ("c.jpg, d", "e")]
    lines = [f"{n}.jpg,{text}" for n, texts in enumerate(captions) for text in texts]
    (root / "flickr30k_test_karpathy.txt").write_text("image,caption\n" + "\n".join(lines) + "\n")
    return Made([], files, captions=captions)


def make_flickr_csv(root: Path) -> Made:
    files = [jpeg(n, root / f"flickr30k-images/{n}.jpg") for n in range(2)]
    with (root / "flickr_annotations_30k.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for n, texts in enumerate(CAPTIONS):
            writer.writerow([json.dumps(texts), "[]", "test", f"{n}.jpg", n])
        writer.writerow(['["no"]', "[]", "train", "9.jpg", 9])
    return Made([], files, captions=list(CAPTIONS))


MAKERS: list[tuple[str, Callable[[Path], Made]]] = [
    ("imagenet", make_imagenet),
    ("imagenet", make_imagenet_kaggle),
    ("imagenet", lambda root: replace(folders(root / "val", WNIDS), names=["tench"])),
    ("imagenet100", make_imagenet100),
    ("imagenetv2", make_v2),
    ("imagenet-a", lambda root: replace(folders(root / "imagenet-a", wnids("A"), 2), names=["stingray"])),
    ("imagenet-r", lambda root: replace(folders(root, wnids("R"), 2), names=["goldfish"])),
    ("imagenet_sketch", lambda root: replace(folders(root / "sketch", WNIDS), names=["tench"])),
    ("objectnet", make_objectnet),
    ("cifar10", make_cifar10),
    ("cifar100", make_cifar100),
    ("dtd", make_dtd),
    ("mnist", make_mnist),
    ("sun397", make_sun397),
    ("fgvc_aircraft", make_aircraft),
    ("flowers", make_flowers),
    ("food101", make_food),
    ("pets", make_pets),
    ("stl10", make_stl10),
    ("mscoco", make_coco),
    ("flickr30k", make_flickr_json),
    ("flickr30k", make_flickr_txt),
    ("flickr30k", make_flickr_csv),
]
NAMES = {"n01440764": "tench", "n01443537": "goldfish", "n01498041": "stingray", "n01558993": "robin"}


def make_cifar_train(root: Path, folder: str, files: list[str], meta: str, key: str, label_key: str, n: int) -> Made:
    """A label and an image of each class in every file."""
    (root / folder).mkdir(parents=True)
    data = np.random.default_rng(4).integers(0, 256, (len(files), n, 3072), dtype=np.uint8)
    for part, file in zip(data, files, strict=True):
        (root / folder / file).write_bytes(pickle.dumps({"data": part, label_key: list(range(n))}, protocol=2))
    (root / folder / meta).write_bytes(pickle.dumps({key: [f"thing_{i}" for i in range(n)]}, protocol=2))
    pixels = list(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Made([*range(n)] * len(files), pixels=pixels, names=["thing 0", "thing 1"])


def make_cifar10_train(root: Path) -> Made:
    files = [f"data_batch_{n}" for n in range(1, 6)]
    return make_cifar_train(root, "cifar-10-batches-py", files, "batches.meta", "label_names", "labels", 10)


def make_cifar100_train(root: Path) -> Made:
    return make_cifar_train(root, "cifar-100-python", ["train"], "meta", "fine_label_names", "fine_labels", 100)


def make_dtd_split(root: Path, split: str) -> Made:
    """The tree of the test images has them as another split, and the list next to it names other files."""
    made = make_dtd(root)
    labels = root / "dtd/dtd/labels"
    (labels / "test1.txt").rename(labels / f"{split}1.txt")
    (labels / "test1.txt").write_text("banded/a_77.jpg\n")
    return made


def make_flowers_split(root: Path, split: str) -> Made:
    made = make_flowers(root)
    ids = {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]}
    ids["trnid" if split == "train" else "valid"] = list(range(103, 205))
    savemat(root / "flowers-102/setid.mat", {key: np.array([value]) for key, value in ids.items()})
    return made


def make_food_train(root: Path) -> Made:
    made = make_food(root)
    (root / "food-101/meta/test.json").rename(root / "food-101/meta/train.json")
    return made


def make_pets_train(root: Path) -> Made:
    made = make_pets(root)
    folder = root / "oxford-iiit-pet/annotations"
    (folder / "test.txt").rename(folder / "trainval.txt")
    return made


SPLIT_MAKERS: list[tuple[str, str, Callable[[Path], Made]]] = [
    ("cifar10", "train", make_cifar10_train),
    ("cifar100", "train", make_cifar100_train),
    ("dtd", "train", lambda root: make_dtd_split(root, "train")),
    ("dtd", "val", lambda root: make_dtd_split(root, "val")),
    ("flowers", "train", lambda root: make_flowers_split(root, "train")),
    ("flowers", "val", lambda root: make_flowers_split(root, "val")),
    ("food101", "train", make_food_train),
    ("pets", "train", make_pets_train),
]
