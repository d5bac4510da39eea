"""Images, sources and shards that the data tests share, all made from seeds."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.shards.index import Shard, ShardIndex, pack, write_index, write_tar
from pipeline.data.sources.sample import Sample
from pipeline.files import sha256_of

sys.path.insert(0, str(Path(__file__).parent))  # for what more than one test file could want

import faulty_s3


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    """photo(seed, width=48, height=40) -> a smooth RGB image with some noise, as a photograph has."""

    def make(seed: int, width: int = 48, height: int = 40) -> Image.Image:
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
        return Image.fromarray(np.clip(smooth + draw.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(image, "JPEG", quality=..) -> bytes."""

    def make(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., Image.Image]) -> Path:
    """53 JPEGs in the folders ankle_boot, hat and t-shirt."""
    root = tmp_path_factory.mktemp("source") / "clothes"
    for number in range(53):
        folder = root / ("ankle_boot", "hat", "t-shirt")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        photo(number).save(folder / f"{number:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> ShardIndex:
    """The 53 images in shards of 12."""
    return pack(class_folders, tmp_path_factory.mktemp("shards") / "clothes", samples_per_shard=12).index


@pytest.fixture
def shards_of(tmp_path: Path) -> Callable[..., ShardIndex]:
    """shards_of([members, ..], classes=("hat",), per_shard=8) -> shards of exactly these members, indexed as they are.

    Sample i has the key ``k00i``; a broken sample thus gets past pack, as it does when a disk or a copy breaks it.
    """

    def make(
        members: list[dict[str, bytes]], classes: tuple[str, ...] | None = ("hat",), per_shard: int = 8
    ) -> ShardIndex:
        folder = tmp_path / "handmade"
        folder.mkdir()
        samples = [Sample(f"k{number:03d}", "", Path()) for number in range(len(members))]
        files = {sample.key: files for sample, files in zip(samples, members, strict=True)}
        shards: list[Shard] = []
        for start in range(0, len(samples), per_shard):
            path = folder / f"shard-{len(shards):05d}.tar"
            shards.append(write_tar(path, samples[start : start + per_shard], lambda sample: files[sample.key]))
        return write_index(folder, shards, classes, {"format": "handmade"})

    return make


@pytest.fixture(scope="session")
def reindex() -> Callable[[ShardIndex], ShardIndex]:
    """Write a new index over changed tars: what remains is damage that only reading can find."""

    def make(index: ShardIndex) -> ShardIndex:
        shards = [
            Shard(s.name, s.samples, (index.directory / s.name).stat().st_size, sha256_of(index.directory / s.name))
            for s in index.shards
        ]
        return write_index(index.directory, shards, index.classes, index.source)

    return make


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[faulty_s3.FaultyStore]:
    """rclone's S3 server behind a proxy that fails and dawdles; the environment leads to it."""
    import s3fs

    with faulty_s3.faulty_store(tmp_path) as found:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        yield found
    s3fs.S3FileSystem.clear_instance_cache()
