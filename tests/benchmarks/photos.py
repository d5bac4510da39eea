"""Photographs for the loader's rows: JPEGs of 100 kB made from the demo's, or the user's own."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import IMAGE_EXTENSIONS, STORED_EXTENSIONS
from pipeline.data.shards.index import load_index, open_shard
from pipeline.demo.assets import unpack

# Noise and quality bring a small photograph, enlarged, to the size and the entropy of a real one: about 96 kB.
WIDTH, HEIGHT, NOISE, QUALITY = 375, 370, 12, 96


def made_photos(folder: Path, number: int) -> Path:
    """`number` noisy enlargements of the demo's photographs, as FOLDER/photos/CLASS/IMAGE.jpg."""
    draw = np.random.default_rng(0)
    tar = open_shard(load_index(unpack(folder / "demo", "clothing_train.tar.gz") / "clothing_train"), 0)
    for i in range(number):
        ext = next(ext for ext in STORED_EXTENSIONS if ext in tar.samples[i].members)
        small = Image.open(io.BytesIO(tar.read(i, ext))).convert("RGB")
        pixels = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float64)
        noisy = np.clip(pixels + draw.normal(0, NOISE, pixels.shape), 0, 255).astype(np.uint8)
        file = folder / "photos" / f"class_{i % 4}" / f"{i:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(file, quality=QUALITY)
    return folder / "photos"


def own_photos(source: Path, folder: Path) -> Path:
    """Class folders of images: `source` itself, or what the archive `source` holds, unpacked into FOLDER/own."""
    if source.is_dir():
        return source
    with tarfile.open(source) as tar:
        tar.extractall(folder / "own", filter="data")
    inside = [each for each in (folder / "own").iterdir() if each.is_dir()]
    return inside[0] if len(inside) == 1 else folder / "own"


def photo_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix[1:].lower() in IMAGE_EXTENSIONS)
