"""The recipe of the embedded demo data: from six public image sets to shards and evaluation sets.

    python -m pipeline.demo.recipe SOURCES OUT        # then OUT/*.tar.gz are the archives in assets/

SOURCES holds the unpacked sets named in LICENCES.md. Images are 64 x 64 and stored as WebP, so that everything,
including the tiny CLIP, fits in 40 MB. This file has every choice made for the demo data.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.eval.wds_layout import write_wds_eval
from pipeline.data.order import stable_hash
from pipeline.data.shards.index import pack
from pipeline.data.sources.sample import Sample, Source
from pipeline.demo.assets import ARCHIVES

SIZE, QUALITY = 64, 75
# The photos of clothes for pretraining, like those that CLIP saw on the web, so that the demo starts above chance.
PRETRAIN_SHARE_OF_CLOTHING = 0.25
PRETRAIN_FASHION = 2000
HELD_OUT_CLIPART = 0.2
# Reference images for section keep, from the pretraining mix.
REFERENCE = 2048

CLOTHING = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
# Fashion-MNIST's names for the same things; its bags have no counterpart among the photos.
FASHION_TO_CLOTHING = {
    "ankle boot": "shoes",
    "coat": "outwear",
    "dress": "dress",
    "pullover": "longsleeve",
    "sandal": "shoes",
    "shirt": "shirt",
    "sneaker": "shoes",
    "t-shirt": "t-shirt",
    "trouser": "pants",
}
TEMPLATES = {
    "clothing": ("a photo of {c}.", "a photo of a {c}, a piece of clothing.", "{c}"),
    "fashion": ("a product photo of {c}.", "a grey picture of {c}.", "{c}"),
    "grocery": ("a photo of {c}.", "a photo of {c} in a store.", "{c}"),
    "emoji": ("a picture of {c}.", "an emoji of {c}.", "{c}"),
    "clipart": ("a clip art of {c}.", "a drawing of {c}.", "{c}"),
}
EMOJI_STYLES, EMOJI_HELD_OUT = ("noto", "twemoji", "emojione"), "fluent3d"


@dataclass(frozen=True)
class Picture:
    """One source image with everything known about it. ``kind`` is the broad name, ``name`` the precise one."""

    path: Path
    kind: str
    name: str


def clothing(root: Path, *splits: str) -> Iterator[Picture]:
    for path in sorted(file for split in splits for file in (root / "clothing" / split).glob("*/*.jpg")):
        yield Picture(path, path.parent.name, path.parent.name)


def fashion(root: Path, split: str) -> Iterator[Picture]:
    for path in sorted((root / "fashion_mnist" / split).glob("*/*.png")):
        if path.parent.name in FASHION_TO_CLOTHING:
            yield Picture(path, FASHION_TO_CLOTHING[path.parent.name], path.parent.name)


def grocery(root: Path, split: str) -> Iterator[Picture]:
    """Read grocery/<split>/<Fruit|..>/<coarse>/[<fine>/]file.jpg."""
    base = root / "grocery" / split
    for path in sorted(base.rglob("*.jpg")):
        parts = path.relative_to(base).parts[1:-1]
        yield Picture(path, _words(parts[0]), _words(parts[-1]))


def emoji(root: Path, *styles: str) -> Iterator[Picture]:
    with (root / "emoji" / "emoji.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["style"] in styles:
                yield Picture(root / row["file"], _words(row["subcategory"]), row["name"].lower())


def clipart(root: Path, *, held_out: bool) -> Iterator[Picture]:
    base = root / "openclipart"
    for path in sorted(base.rglob("*.jpg")):
        relative = path.relative_to(base)
        chosen = stable_hash("clipart", relative.as_posix()) % 1000 < 1000 * HELD_OUT_CLIPART
        if chosen == held_out:
            yield Picture(path, relative.parts[0], _words(re.sub(r"_\d*$", "", path.stem)))


def _words(name: str) -> str:
    return re.sub(r"[\s_&-]+", " ", name).strip().lower()


def captions(picture: Picture, templates: Iterable[str]) -> tuple[str, ...]:
    """Every template over the precise and the broad name, each sentence once."""
    names = dict.fromkeys((picture.name, picture.kind))
    sentences = [template.format(c=name) for template in templates for name in names]
    return tuple(dict.fromkeys(sentences)) + ((f"{picture.name}, {picture.kind}",) if len(names) > 1 else ())


def pretraining(root: Path) -> Iterator[tuple[Picture, tuple[str, ...]]]:
    """The pretraining mix: drawings in three styles, clip art, groceries, and a part of both clothing sets."""
    for picture in emoji(root, *EMOJI_STYLES):
        yield picture, captions(picture, TEMPLATES["emoji"])
    for picture in clipart(root, held_out=False):
        yield picture, captions(picture, TEMPLATES["clipart"])
    for picture in grocery(root, "train"):
        yield picture, captions(picture, TEMPLATES["grocery"])
    for picture in clothing(root, "train"):
        if stable_hash("clothing", picture.path.name, picture.kind) % 1000 < 1000 * PRETRAIN_SHARE_OF_CLOTHING:
            yield picture, captions(picture, TEMPLATES["clothing"])
    by_draw = sorted(
        fashion(root, "train"), key=lambda p: stable_hash("fashion", p.path.as_posix().split("/train/")[1])
    )
    for picture in by_draw[:PRETRAIN_FASHION]:
        yield picture, captions(picture, TEMPLATES["fashion"])


def reference(root: Path) -> list[tuple[Picture, tuple[str, ...]]]:
    """A draw from the pretraining mix without clothes; none of its images is in an evaluation set.

    The clip art library holds some drawings twice, once in each part of the split.
    """
    evaluated = {_content(picture) for picture in clipart(root, held_out=True)}
    others = [
        (picture, texts)
        for picture, texts in pretraining(root)
        if picture.path.relative_to(root).parts[0] != "clothing" and _content(picture) not in evaluated
    ]
    others.sort(key=lambda each: stable_hash("reference", each[0].path.relative_to(root).as_posix()))
    return others[:REFERENCE]


def _content(picture: Picture) -> bytes:
    return hashlib.sha256(picture.path.read_bytes()).digest()


class Stage:
    """Re-encoded copies of the images in a working folder, one per source image."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder, self._root = folder, root

    def image(self, picture: Picture) -> Path:
        target = (self._folder / picture.path.relative_to(self._root)).with_suffix(".webp")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(picture.path).convert("RGB")
            if image.size != (SIZE, SIZE) and min(image.size) > SIZE:
                image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            image.save(target, "WEBP", quality=QUALITY, method=6)
        return target

    def samples(
        self, pictures: Iterable[tuple[Picture, tuple[str, ...]]], label: Callable[[Picture], int] | None = None
    ) -> list[Sample]:
        return [
            Sample(
                key=f"{number:06d}",
                name=picture.path.relative_to(self._root).as_posix(),
                image=self.image(picture),
                cls=label(picture) if label else None,
                captions=texts,
            )
            for number, (picture, texts) in enumerate(pictures)
        ]


def build(root: Path, out: Path) -> None:
    """Write pretrain/, reference/ and clothing_train/ as shards and one folder per evaluation set under eval/."""
    stage = Stage(out / "images", root)
    mix = Source("demo", root, stage.samples(pretraining(root)))
    pack(mix, out / "pretrain", samples_per_shard=2048)
    pack(Source("demo", root, stage.samples(reference(root))), out / "reference", samples_per_shard=512)
    photos = stage.samples(((p, ()) for p in clothing(root, "train")), lambda p: CLOTHING.index(p.kind))
    pack(Source("demo", root, photos, classes=list(CLOTHING)), out / "clothing_train", samples_per_shard=512)
    for name, pictures, classes in (
        ("clothing", clothing(root, "validation", "test"), CLOTHING),
        ("fashion", fashion(root, "test"), CLOTHING),
        ("grocery", grocery(root, "test"), None),
        ("emoji", emoji(root, EMOJI_HELD_OUT), None),
        ("clipart", clipart(root, held_out=True), None),
    ):
        found = list(pictures)
        names = list(classes or sorted({picture.kind for picture in found}))
        labelled = stage.samples(((p, ()) for p in found), lambda p, names=names: names.index(p.kind))
        write_wds_eval(labelled, out / "eval" / name, classnames=names, templates=list(TEMPLATES[name]))
    write_wds_eval(stage.samples(_emoji_names(root)), out / "eval" / "emoji_names", kind="retrieval")


def _emoji_names(root: Path) -> Iterator[tuple[Picture, tuple[str, ...]]]:
    """One drawing per concept, with its name in two wordings; variants of skin tone and flags are left out."""
    seen: set[str] = set()
    for picture in emoji(root, EMOJI_HELD_OUT):
        if ":" not in picture.name and "flag" not in picture.kind and picture.name not in seen:
            seen.add(picture.name)
            yield picture, (picture.name, f"an emoji of {picture.name}.")


def archive(folder: Path, target: Path) -> None:
    """A folder as tar.gz with bytes that depend only on its content; the package ships it (assets.py)."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    # An empty name; otherwise gzip would put that of the target into the header.
    with (
        target.open("wb") as out,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=out, mtime=0) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, f"{folder.name}/{path.relative_to(folder)}", filter=plain)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
    for archive_name, folder_name in ARCHIVES.items():
        archive(Path(sys.argv[2]) / folder_name, Path(sys.argv[2]) / archive_name)
