"""A folder of fetched files with a size limit (cache_budget.py), shared by the processes of a machine.

    CACHE/files/<digest of url and version>/NAME        complete, because it is renamed; its mtime is its last use
    CACHE/files/<digest ..>/NAME.part                   incomplete
    CACHE/locks/<digest ..>.lock                        held while it is fetched or removed

Decoded evaluation images are also entries (decoded_cache.py). A removed file stays readable for processes that have it
open, and uses disk space until they close it. Locks end with the process that holds them, however it ends.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import ConfigError

OFF = "off"

logger = logging.getLogger("selora.data")


@dataclass(frozen=True)
class Cache:
    """A directory for fetched files.

    ``max_bytes`` bounds the size of its files, including those that are being written. ``attempts``: number of requests
    to a failing store before it counts as unavailable.
    """

    directory: Path
    max_bytes: int
    attempts: int = 9

    @staticmethod
    def named(place: str | None) -> Cache | None:
        """The cache by its name: a directory, "off" for none, None for the machine's own."""
        if place == OFF:
            return None
        machine = Cache.from_environment()
        return machine if place is None else replace(machine, directory=expand(place).absolute())

    @staticmethod
    def from_environment() -> Cache:
        directory = cache_directory()
        value = os.environ.get("SELORA_CACHE_GB", "100")
        try:
            gigabytes = float(value)
        except ValueError:
            gigabytes = 0.0
        if not gigabytes > 0:
            raise ConfigError(f"SELORA_CACHE_GB: should be a number of gigabytes above 0, got {value!r}")
        return Cache(directory, int(gigabytes * 1e9))


def cache_directory() -> Path:
    """The machine's cache: SELORA_CACHE, else `selora` in XDG_CACHE_HOME, in ~/.cache, or below TMPDIR with a warning.

    TMPDIR is for a process without a writable home, such as some user ids in containers.
    """
    value = os.environ.get("SELORA_CACHE")
    if value:
        return expand(value)
    wanted = [expand(place) for place in (os.environ.get("XDG_CACHE_HOME"), "~/.cache") if place]
    usable = [base for base in wanted if base.is_absolute() and _is_writable(base)]
    return usable[0] / "selora" if usable else _temporary(wanted[0])


def expand(path: str) -> Path:
    """`path` with ~ expanded; unchanged if no home directory is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _is_writable(directory: Path) -> bool:
    """Whether a directory is writable or can be created."""
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@functools.cache
def _temporary(refused: Path) -> Path:
    """A directory below TMPDIR that belongs to this user; one of another user is not used."""
    directory = Path(tempfile.gettempdir()) / f"selora-cache-{os.getuid()}"
    with suppress(OSError):
        directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or not directory.is_dir() or directory.stat().st_uid != os.getuid():
        directory = Path(tempfile.mkdtemp(prefix="selora-cache-"))
    logger.warning("%s cannot be written; the cache is in %s, give another by SELORA_CACHE", refused, directory)
    return directory


def entry_of(cache: Cache, url: str, version: str, name: str) -> Path:
    """The path of the copy of one version of a file, whether it exists or not."""
    digest = hashlib.sha256(f"{url}\0{version}".encode()).hexdigest()[:24]
    return cache.directory / "files" / digest / name


def lock_of(cache: Cache, path: Path) -> Path:
    locks = cache.directory / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{path.parent.name}.lock"


def touch(path: Path) -> bool:
    """Record that a copy is used now; False if it does not exist."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
