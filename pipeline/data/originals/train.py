"""ImageNet-1K's training images, listed without opening them."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.originals.imagenet import TRAIN_PLACES, image_names, subfolders, wnids
from pipeline.data.shards.parallel_pack import Listing

IMAGES = 1_281_167
_HOLDS = (
    "the 1000 wnid folders of ILSVRC2012_img_train.tar, each class tar unpacked into a folder of its name, or train/"
)


def list_imagenet_train(root: str | Path, images: int = IMAGES) -> Listing:
    """The training images in wnid folders; labels are positions in the sorted wnids. ConfigError for wrong counts."""
    base = _base(Path(root))
    wanted, there = wnids(), set(subfolders(base))
    files = tuple(image_names(base / wnid) if wnid in there else [] for wnid in wanted)
    listing = Listing(base, wanted, files)
    filled = sum(bool(names) for names in files)
    if len(listing) != images or filled < len(wanted):
        count, smallest = min((len(names), wnid) for wnid, names in zip(wanted, files, strict=True))
        raise ConfigError(
            f"{base}: not the whole dataset\n"
            f"  images: {len(listing)} found, {images} expected\n"
            f"  classes: {filled} found, {len(wanted)} expected; the smallest is {smallest} with {count}\n"
            f"likely: {_cause(len(listing), images)}\nit must hold {_HOLDS}"
        )
    return listing


def _base(root: Path) -> Path:
    first = wnids()[0]
    for place in TRAIN_PLACES:
        if (root / place / first).is_dir():
            return root / place
    tars = f"; {first}.tar is there, so unpack each class tar" if (root / f"{first}.tar").is_file() else ""
    raise ConfigError(f"{root}: no folder {first} in it or in train/{tars}\nit must hold {_HOLDS}")


def _cause(found: int, images: int) -> str:
    if found == 50_000:
        return "these are the validation images"
    if found > images:
        return "there are other images among them"
    return "an interrupted download or extraction; classes of the original hold 732 to 1300 images"
