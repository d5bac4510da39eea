"""A folder of fetched files under a bound (room.py), shared by the processes of a machine.

    CACHE/files/<digest of url and version>/NAME        complete, for it is renamed to that; its mtime is its last use
    CACHE/files/<digest ..>/NAME.part                   begun
    CACHE/locks/<digest ..>.lock                        held while it is fetched or removed

Decoded evaluation images are entries, too (pixels.py). A removed file stays readable for whoever has it open, and takes
its room on the disk until then. Locks end with the process that holds them, however it ends.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import ConfigError

OFF = "off"


@dataclass(frozen=True)
class Cache:
    """``max_bytes`` bounds what files take of the disk, also those that are just being written. ``attempts``: how often
    a failing store is asked before it counts as gone."""

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
