"""Checks shards against their index: sizes, checksums, counts, keys, members, and that every image decodes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.images import MAX_PIXELS, STORED_EXTENSIONS, BadImageError, decode
from pipeline.data.shards.index import Shard, read_index, size_fault
from pipeline.data.shards.members import sample_texts
from pipeline.data.sources.account import Account
from pipeline.data.storage.folders import LocalFolder
from pipeline.data.storage.remote import is_remote
from pipeline.data.storage.tar import TarError, TarIndex
from pipeline.files import sha256_of


@dataclass(frozen=True)
class VerifyReport:
    """Result of verify. ``faults`` has a line for each fault, by shard and key."""

    directory: Path
    shards: int
    samples: int
    faults: list[str]
    account: Account | None = None

    @property
    def ok(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        lines = [f"{self.directory}: {self.samples} samples in {self.shards} shards"]
        lines += [f"  fault: {fault}" for fault in self.faults] or ["  ok"]
        lines += [] if self.account is None else [f"as packed: {self.account}"]
        return "\n".join(lines)


def verify(
    directory: str | Path, *, decode: bool = True, max_pixels: int = MAX_PIXELS, workers: int = 4
) -> VerifyReport:
    """Compare shards with their index: size, checksum, count, keys, members and, with ``decode``, every image.

    Every fault is reported; none stops the check. Raises ConfigError if the index itself cannot be read.
    """
    if is_remote(directory):
        raise ConfigError(
            f"{directory}: verify reads a directory; a shard behind a URL is checked by its sha256 when it is fetched"
        )
    index = read_index(LocalFolder(Path(directory)))
    known = {shard.name for shard in index.shards}
    faults = [
        f"{path.name}: not in the index" for path in sorted(index.directory.glob("*.tar")) if path.name not in known
    ]
    account = None
    try:
        if "account" in index.source:  # shards of an older version have none
            account = Account.from_json(index.source["account"])
    except ValueError as error:
        faults.append(f"index.json: {error}")
    seen: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        for shard in index.shards:
            if index.source.get("format") == "webdataset":
                seen = {}  # other tools often restart their numbers in each tar
            found, tar = _shard_faults(index.directory, shard)
            faults += found
            if tar is None:
                continue
            check = _SampleCheck(tar, index.classes, max_pixels if decode else None)
            for number, reasons in enumerate(pool.map(check, range(len(tar)))):
                key = tar.samples[number].key
                if key in seen:
                    reasons.append(f"its key is also in {seen[key]}")
                seen[key] = shard.name
                faults += [f"{shard.name}/{key}: {reason}" for reason in reasons]
            tar.close()
    return VerifyReport(index.directory, len(index.shards), index.samples, faults, account)


def _shard_faults(folder: Path, shard: Shard) -> tuple[list[str], TarIndex | None]:
    faults = []
    size = size_fault(folder, shard)
    if size:
        faults.append(f"{shard.name}: {size}")
    path = folder / shard.name
    if not path.is_file():
        return faults, None
    if not size and sha256_of(path) != shard.sha256:
        faults.append(f"{shard.name}: its content has changed since it was packed (sha256)")
    try:
        tar = TarIndex(path)
    except TarError as error:
        return [*faults, str(error)], None
    faults += _table_faults(path, shard, tar)
    if len(tar) != shard.samples:
        faults.append(f"{shard.name}: {len(tar)} samples where its index has {shard.samples}")
    return faults, tar


def _table_faults(path: Path, shard: Shard, tar: TarIndex) -> list[str]:
    """Differences between the headers and the table of members, which training uses."""
    if shard.table is None:
        return []
    try:
        listed = TarIndex(path, table=shard.table)
    except TarError as error:
        return [str(error)]
    same = listed.samples == tar.samples
    listed.close()
    return [] if same else [f"{shard.name}: its table of members differs from its headers; pack the source again"]


@dataclass(frozen=True)
class _SampleCheck:
    """The faults of sample ``number`` of a tar. ``max_pixels`` None: without decoding."""

    tar: TarIndex
    classes: Sequence[str] | None
    max_pixels: int | None

    def __call__(self, number: int) -> list[str]:
        members = self.tar.samples[number].members
        images = [ext for ext in STORED_EXTENSIONS if ext in members]
        reasons = [] if images else [f"no image among its members ({self.tar.samples[number]})"]
        try:
            label, texts = sample_texts(self.tar, number, self.classes)
            if not texts and (label < 0 or self.classes is None):
                reasons.append(f"neither caption nor class among its members ({self.tar.samples[number]})")
        except BadImageError as error:
            reasons.append(str(error))
        if images and self.max_pixels is not None:
            try:
                decode(self.tar.read(number, images[0]), max_pixels=self.max_pixels)
            except BadImageError as error:
                reasons.append(str(error))
        return reasons
