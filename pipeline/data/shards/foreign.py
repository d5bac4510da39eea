"""An index.json for existing WebDataset tars, which are not changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.images import MAX_PIXELS
from pipeline.data.shards.index import INDEX_NAME, PackReport, Shard, described, load_index, sha256_of, write_index
from pipeline.data.shards.tar_source import read_members, read_tars, tar_files
from pipeline.data.sources.account import MAX_UNREADABLE
from pipeline.data.sources.readable import usable_samples
from pipeline.data.sources.sample import Source, SourceOptions
from pipeline.data.storage.tar import TarIndex


def read_shards(directory: Path) -> Source:
    """The samples of a folder of shards, as a source. Raises ConfigError if its index or a tar is damaged."""
    index = load_index(directory)
    return read_members(directory, [directory / shard.name for shard in index.shards], index.classes)


def index_tars(
    source: str | Path,
    *,
    options: SourceOptions = SourceOptions(),  # noqa: B008 - frozen
    force: bool = False,
    decoded: bool = True,
    max_unreadable: float = MAX_UNREADABLE,
    max_pixels: int = MAX_PIXELS,
    workers: int = 4,
) -> PackReport:
    """Check tars and write an index.json next to them, to train on them without copying.

    An unusable sample stays in its tar; training skips it, like one that is damaged later.

    Args:
        source: A folder, a tar or a pattern (``shards/{00000..00010}.tar``); all tars in one folder.
        options: Source of the class names.
        force: Replace an existing index.
        decoded: Whether to decode every image once.
        max_unreadable: Largest share of unusable samples.
        max_pixels: An image with more pixels is unusable.
        workers: Decoding threads.

    Returns:
        The index, and the account of all samples.

    Raises:
        ConfigError: For a damaged tar, too many unusable samples, tars of several folders, or an existing index.
    """
    files = tar_files(source)
    folder = files[0].parent
    if other := next((file for file in files if file.parent != folder), None):
        raise ConfigError(f"{source}: tars of one folder make an index, and {other} is not in {folder}")
    if (folder / INDEX_NAME).exists() and not force:
        raise ConfigError(f"{folder / INDEX_NAME}: exists already; give --force to replace it")
    data = replace(read_tars(source, options), notes=())  # whose messages suggest this command
    _, account = usable_samples(
        data, decoded=decoded, max_unreadable=max_unreadable, max_pixels=max_pixels, workers=workers
    )
    shards = [Shard(file.name, len(TarIndex(file)), file.stat().st_size, sha256_of(file)) for file in files]
    return PackReport(write_index(folder, shards, data.classes, described(data, account)), account, data)
