"""Finds reference images that are also evaluated, by their content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config, ConfigError
from pipeline.data.images import STORED_EXTENSIONS
from pipeline.data.reference.features import content_hash
from pipeline.data.shards.index import load_index, open_shard
from pipeline.data.storage.remote import is_remote
from pipeline.data.storage.tar import TarIndex
from pipeline.evaluation.datasets.benchmark import load_benchmark

# Images named in the message.
_NAMED = 5


def check_overlap(config: Config) -> None:
    """Refuse reference images (`keep.images`) that are also in a dataset of `eval.benchmark`.

    Only local files are compared. Equal images have equal files, and only files of equal size are read.

    Raises:
        ConfigError: naming datasets and images.
    """
    keep, evaluated = config.keep, config.eval
    if not keep.weight or keep.images is None or keep.allow_overlap or evaluated.benchmark is None:
        return
    if is_remote(keep.images):
        return
    index = load_index(keep.images)
    by_size: dict[int, list[tuple[TarIndex, int, str]]] = defaultdict(list)
    for number in range(len(index.shards)):
        for tar, sample, ext, size in _images(open_shard(index, number)):
            by_size[size].append((tar, sample, ext))
    hashes: dict[int, set[int]] = {}
    found: dict[str, list[str]] = defaultdict(list)
    for row in load_benchmark(evaluated.benchmark, evaluated.root).choose(evaluated.datasets).rows:
        for path in sorted(Path(row.path).glob("test/*.tar")) if isinstance(row.path, Path) else ():
            for tar, sample, ext, size in _images(TarIndex(path)):
                if size not in by_size:
                    continue
                if size not in hashes:
                    hashes[size] = {content_hash(ref.read(at, kind)) for ref, at, kind in by_size[size]}
                if content_hash(tar.read(sample, ext)) in hashes[size]:
                    found[row.key].append(f"{tar.path.name}/{tar.samples[sample].key}")
    if found:
        count = sum(map(len, found.values()))
        named = ", ".join(f"{key} {each}" for key, keys in found.items() for each in keys[:_NAMED])
        named += ", .." * any(len(keys) > _NAMED for keys in found.values())
        raise ConfigError(
            f"keep.images={keep.images}: {count} of its images are also evaluated ({named}); "
            "take other reference images, or set keep.allow_overlap=true"
        )


def _images(tar: TarIndex) -> Iterator[tuple[TarIndex, int, str, int]]:
    """(tar, number of the sample, extension, bytes) of every image in a tar."""
    for number, sample in enumerate(tar.samples):
        ext = next((ext for ext in STORED_EXTENSIONS if ext in sample.members), None)
        if ext is not None:
            yield tar, number, ext, sample.members[ext].size
