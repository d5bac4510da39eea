"""Tar shards of samples with an index.json that describes them: writing, reading and checking both."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from webdataset.writer import TarWriter

from pipeline.config import ConfigError
from pipeline.data.images import MAX_PIXELS, stored_extension
from pipeline.data.order import seeded_permutation, stable_hash
from pipeline.data.shards.members import caption_member
from pipeline.data.shards.tar_source import holds_tars, is_pattern
from pipeline.data.sources.account import MAX_UNREADABLE, Account
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.readable import usable_samples
from pipeline.data.sources.sample import Sample, Source, SourceOptions
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.folders import Folder, LocalFolder, folder_at
from pipeline.data.storage.tar import Member, TarError, TarIndex, add_table
from pipeline.files import replacing, sha256_of

FORMAT_NAME, FORMAT_VERSION = "selora-shards", 1
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class Shard:
    """One tar, as recorded in the index.

    ``table`` is the position of the table of members in the tar; None for tars of other tools and older versions.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    table: Member | None = None

    def as_json(self) -> dict[str, Any]:
        """The input of ``from_json``."""
        known = {"name": self.name, "samples": self.samples, "bytes": self.bytes, "sha256": self.sha256}
        return known if self.table is None else known | {"table": [self.table.offset, self.table.size]}

    @staticmethod
    def from_json(known: dict[str, Any]) -> Shard:
        """Raises KeyError or TypeError for anything but a shard."""
        name, samples, size, sha256 = (known[key] for key in ("name", "samples", "bytes", "sha256"))
        table = known.get("table")
        return Shard(name, samples, size, sha256, None if table is None else Member(*table))


@dataclass(frozen=True)
class ShardIndex:
    """A folder of shards. ``classes`` are readable names by label, None if samples have captions only."""

    folder: Folder
    shards: tuple[Shard, ...]
    samples: int
    classes: tuple[str, ...] | None
    digest: str
    source: dict[str, Any]

    @property
    def directory(self) -> Path:
        """The directory of local shards."""
        return Path(self.folder.location)

    def sizes(self) -> list[int]:
        return [shard.samples for shard in self.shards]


@dataclass(frozen=True)
class PackReport:
    """Result of pack: the index, its source, and the account of everything in the source."""

    index: ShardIndex
    account: Account
    source: Source

    @property
    def left_out(self) -> list[str]:
        """ "name: reason" of each sample that is not packed."""
        return [str(each) for each in self.account.left_out]


def load_index(location: str | Path, cache: Cache | None = None) -> ShardIndex:
    """The index of a shard folder, after a cheap check that each tar exists with the recorded size.

    ``location``: a folder, or a URL (see remote.py), whose shards are copied into ``cache`` and checked by their sha256
    when they are opened. Raises ConfigError with the shard's name.
    """
    index = read_index(folder_at(location, cache))
    if isinstance(index.folder, LocalFolder):
        for shard in index.shards:
            fault = size_fault(index.directory, shard)
            if fault:
                raise ConfigError(f"{index.directory / shard.name}: {fault}; copy it again or pack the source again")
    return index


def open_shard(index: ShardIndex, number: int) -> TarIndex:
    """The samples of one shard; TarError if their number differs from the index."""
    shard = index.shards[number]
    tar = index.folder.open_tar(shard.name, size=shard.bytes, sha256=shard.sha256, table=shard.table)
    if len(tar) != shard.samples:
        raise TarError(f"{tar.name}: {len(tar)} samples where its index has {shard.samples}; pack the source again")
    return tar


def fetch_shard(index: ShardIndex, number: int) -> None:
    """Copy a shard before it is opened, unless another process is copying it. Raises ConfigError."""
    shard = index.shards[number]
    index.folder.fetch(shard.name, size=shard.bytes, sha256=shard.sha256)


def read_index(folder: Folder) -> ShardIndex:
    """The index, without checking its tars. Raises ConfigError."""
    file = f"{folder.location}/{INDEX_NAME}"
    text = folder.read_text(INDEX_NAME)
    if text is None:
        raise ConfigError(f"{folder.location}: {_without_index(folder)}")
    try:
        content = json.loads(text)
        if (content["format"], content["version"]) != (FORMAT_NAME, FORMAT_VERSION):
            raise ConfigError(f"{file}: {content['format']} {content['version']} is not {FORMAT_NAME} {FORMAT_VERSION}")
        shards = tuple(map(Shard.from_json, content["shards"]))
        classes = None if content["classes"] is None else tuple(content["classes"])
        index = ShardIndex(folder, shards, content["samples"], classes, content["digest"], content["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged ({type(error).__name__}: {error}); pack the source again") from error
    if index.digest != _digest(shards, classes) or index.samples != sum(index.sizes()):
        raise ConfigError(f"{file}: digest and content disagree, so it was edited or is mixed; pack the source again")
    if outside := next((shard.name for shard in shards if Path(shard.name).name != shard.name), None):
        raise ConfigError(
            f"{file}: names the shard {outside!r}, and shards are files next to it; do not use this folder"
        )
    return index


def _without_index(folder: Folder) -> str:
    """The message for a location without index.json, with the way out."""
    if is_pattern(folder.location) or folder.location.endswith(".tar"):
        return f"name the folder of the shards; `selora index '{folder.location}'` writes the index.json that it needs"
    if not folder.exists():
        return "no such folder; `selora pack SOURCE OUT` writes a folder of shards"
    # Tars of selora without an index come from an interrupted packing.
    if isinstance(folder, LocalFolder) and holds_tars(folder.path) and not any(folder.path.glob("shard-*.tar")):
        return f"no index.json in it; `selora index {folder.location}` takes its tars as they are"
    return "no index.json in it; `selora pack SOURCE OUT` writes a folder of shards"


def size_fault(folder: Path, shard: Shard) -> str | None:
    """How the size of a tar differs from its index; None if it does not."""
    path = folder / shard.name
    if not path.is_file():
        return f"missing, with {shard.samples} samples"
    size = path.stat().st_size
    if size == shard.bytes:
        return None
    return f"{'shorter' if size < shard.bytes else 'longer'} than its index says: {size} bytes instead of {shard.bytes}"


def pack(
    source: str | Path | Source,
    out: str | Path,
    *,
    options: SourceOptions = SourceOptions(),  # noqa: B008 - frozen
    samples_per_shard: int | None = None,
    seed: int = 0,
    force: bool = False,
    check: Literal["decode", "none"] = "decode",
    max_unreadable: float = MAX_UNREADABLE,
    max_pixels: int = MAX_PIXELS,
    workers: int = 4,
) -> PackReport:
    """Write ``source`` as shards of ``samples_per_shard`` (default: about 16 shards, 64 to 5000 samples each).

    Samples are shuffled with ``seed``, because class folders are sorted; equal input gives equal bytes. Image bytes are
    not changed. Each image is decoded once (``check``); unreadable or missing ones are left out and named in report and
    index, and more than the share ``max_unreadable`` is an error. index.json is written last, so the result of an
    interrupted packing is not a shard folder.
    """
    data = source if isinstance(source, Source) else read_source(source, options)
    folder = Path(out)
    check_empty(folder, force)
    good, account = usable_samples(
        data, decoded=check == "decode", max_unreadable=max_unreadable, max_pixels=max_pixels, workers=workers
    )
    order = seeded_permutation(len(good), stable_hash("pack", seed))
    per_shard = samples_per_shard or min(5000, max(64, -(-len(good) // 16)))
    return PackReport(
        _write(folder, [good[i] for i in order], data.classes, per_shard, described(data, account) | {"seed": seed}),
        account,
        data,
    )


def described(data: Source, account: Account) -> dict[str, Any]:
    """The entry of index.json about its source: its account, without paths of this machine."""
    left_out = [str(each) for each in account.left_out]
    return {"format": data.format, "name": data.path.name, "left_out": left_out, "account": account.as_json()}


def _write(
    folder: Path, samples: list[Sample], classes: list[str] | None, per_shard: int, source: dict[str, Any]
) -> ShardIndex:
    with disk_faults_as_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX_NAME).unlink(missing_ok=True)
        for old in (*folder.glob("shard-*.tar*"), *folder.glob(f"{INDEX_NAME}.*.part")):
            old.unlink()
    shards = tuple(
        write_tar(folder / f"shard-{number:05d}.tar", samples[start : start + per_shard], table=True)
        for number, start in enumerate(range(0, len(samples), per_shard))
    )
    return write_index(folder, shards, classes, source)


def write_index(
    folder: Path, shards: Sequence[Shard], classes: Sequence[str] | None, source: dict[str, Any]
) -> ShardIndex:
    """Turn a folder of complete tars into a shard folder. The index appears completely or not at all."""
    content = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "digest": _digest(shards, classes),
        "source": source,
        "classes": None if classes is None else list(classes),
        "shards": [shard.as_json() for shard in shards],
    }
    with appearing(folder / INDEX_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return load_index(folder)


def write_tar(
    path: Path,
    samples: Sequence[Sample],
    members: Callable[[Sample], dict[str, bytes]] | None = None,
    *,
    table: bool = False,
) -> Shard:
    """Write one shard, under a temporary name until it is complete. Equal samples give equal bytes.

    Args:
        path: path of the tar.
        samples: samples, in this order.
        members: function to the files of a sample by extension; None: `sample_members`.
        table: whether the tar gets a table of its members, with which one read opens it.
    """
    files_of = members or sample_members
    with appearing(path) as temporary:
        with temporary.open("wb") as file:
            with TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
                for sample in samples:
                    writer.write({"__key__": sample.key, **files_of(sample)})
        place = add_table(temporary) if table else None
        size, sha256 = temporary.stat().st_size, sha256_of(temporary)
    return Shard(path.name, len(samples), size, sha256, place)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name that no other writer of ``path`` uses; after the block the file replaces ``path``, or is removed."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    with disk_faults_as_errors(path):
        with replacing(path, temporary):
            yield temporary


@contextmanager
def disk_faults_as_errors(path: Path) -> Iterator[None]:
    """Raise a full disk, a missing permission or a vanished source as ConfigError with the file's name."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or path}: {error.strerror}"
        raise ConfigError(f"{what}; the shards are incomplete") from error


def check_empty(folder: Path, force: bool) -> None:
    """Raise ConfigError if the folder is not empty and must not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file; give a folder to write to")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ConfigError(f"{folder}: not empty; give --force to write over it, or another folder")


def sample_members(sample: Sample) -> dict[str, bytes]:
    """The files of one sample by extension: the unchanged image, and ``cls`` and ``txt`` if present."""
    members = {stored_extension(sample.image.suffix, sample.image.read_bytes): sample.image.read_bytes()}
    if sample.cls is not None:
        members["cls"] = str(sample.cls).encode()
    if sample.captions:
        members["txt"] = caption_member(sample.captions)
    return members


def _digest(shards: Sequence[Shard], classes: Sequence[str] | None) -> str:
    """Digest of shards and class names, independent of the folder's name."""
    content = (
        [[shard.name, shard.samples, shard.sha256] for shard in shards],
        None if classes is None else list(classes),
    )
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
