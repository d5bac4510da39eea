"""A folder of fetched files under a bound, shared by the processes of a machine; the oldest used leave first.

    CACHE/files/<digest of url and version>/NAME        complete, for it is renamed to that; its mtime is its last use
    CACHE/files/<digest ..>/NAME.part                   begun
    CACHE/locks/<digest ..>.lock                        held while it is fetched or removed

Decoded evaluation images are entries, too (pixels.py). A removed file stays readable for whoever has it open. Locks
end with the process that holds them, however it ends.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config import ConfigError

OFF = "off"


@dataclass(frozen=True)
class Cache:
    """``max_bytes`` bounds the files together, except for those that are just being fetched. ``attempts``: how often a
    failing store is asked before it counts as gone."""

    directory: Path
    max_bytes: int
    attempts: int = 9

    @staticmethod
    def named(place: str | None) -> Cache | None:
        """By what a user says: a directory, "off" for none, None for the machine's own."""
        if place == OFF:
            return None
        machine = Cache.from_environment()
        return machine if place is None else replace(machine, directory=Path(place).expanduser().absolute())

    @staticmethod
    def from_environment() -> Cache:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = Path(os.environ.get("SELORA_CACHE") or base / "selora").expanduser()
        said = os.environ.get("SELORA_CACHE_GB", "100")
        try:
            gigabytes = float(said)
        except ValueError:
            gigabytes = 0.0
        if not gigabytes > 0:
            raise ConfigError(f"SELORA_CACHE_GB: should be a number of gigabytes above 0, got {said!r}")
        return Cache(directory, int(gigabytes * 1e9))


def entry_of(cache: Cache, url: str, version: str, name: str) -> Path:
    """Where the copy of one version of a file lies, whether it is there or not."""
    digest = hashlib.sha256(f"{url}\0{version}".encode()).hexdigest()[:24]
    return cache.directory / "files" / digest / name


def lock_of(cache: Cache, path: Path) -> Path:
    locks = cache.directory / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{path.parent.name}.lock"


def touch(path: Path) -> bool:
    """Note that a copy is used now; False when there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def make_room(cache: Cache, wanted: int, *, keep: Path) -> None:
    """Remove the oldest used entries until ``wanted`` bytes fit in; ``keep`` and what others just fetch stay."""
    entries = sorted(_Entry.of(folder) for folder in (cache.directory / "files").glob("*") if folder != keep)
    total = wanted + _Entry.of(keep).size + sum(entry.size for entry in entries)
    for entry in entries:
        if total <= cache.max_bytes:
            return
        try:
            with FileLock(lock_of(cache, entry.folder / "any"), blocking=False):
                shutil.rmtree(entry.folder, ignore_errors=True)
        except Timeout:
            continue
        total -= entry.size


@dataclass(frozen=True, order=True)
class _Entry:
    used: float
    size: int
    folder: Path

    @staticmethod
    def of(folder: Path) -> _Entry:
        used, size = 0.0, 0
        try:
            for file in folder.iterdir():
                status = file.stat()
                # What it takes of the disk: files of decoded images have holes.
                used, size = max(used, status.st_mtime), size + 512 * status.st_blocks
        except FileNotFoundError:
            # Another process removed or renamed it in this moment; what it held is counted as gone.
            return _Entry(used, size, folder)
        return _Entry(used, size, folder)
