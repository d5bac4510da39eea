"""The sha256 of tars, computed once per machine, and again if a file has changed.

    CACHE/sums/<digest of the folder>.json     path -> [size, times, sha256]

A file with the same size, inode and times is not read again. The time of an inode's last change (ctime) cannot be set
back, so neither `cp -p` nor a writer that preserves sizes and dates can hide new bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.config import ConfigError
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.tar import TarIndex

# Files that are read in parallel, and seconds that a rank waits for another one that is reading them.
AT_ONCE, PATIENCE = 4, 600
# A file system may count time in steps of two seconds, so a file written just now could still change unnoticed.
UNCHANGED_NS = 2_500_000_000


def content_sums(location: str, tars: Sequence[TarIndex], cache: Cache) -> list[str]:
    """The sha256 of each tar, in hex.

    Args:
        location: Location of the folder, whose tars share an entry in the cache.
        tars: Opened tars. A copy of a remote file has a separate path for every version, so its size is enough.
        cache: Cache of the sums. If it cannot be written, they are computed each time.

    Raises:
        ConfigError: For a file that cannot be read.
    """
    file = (
        cache.directory / "sums" / f"{hashlib.sha256(location.encode(errors='surrogateescape')).hexdigest()[:24]}.json"
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=PATIENCE):
            return _sums(tars, file)
    except (OSError, Timeout):
        return _sums(tars, None)


def _sums(tars: Sequence[TarIndex], file: Path | None) -> list[str]:
    known = {} if file is None else _known(file)
    marks = [_marks(tar) for tar in tars]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        entries = list(pool.map(lambda tar, mark: _entry(tar, mark, known.get(str(tar.path))), tars, marks))
    begun = time.time_ns() - UNCHANGED_NS
    trusted = {
        str(tar.path): entry for tar, entry in zip(tars, entries, strict=True) if all(at < begun for at in entry[2:-1])
    }
    if file is not None and trusted != known:
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps(trusted), encoding="utf-8")
        partial.replace(file)
    return [entry[-1] for entry in entries]


def _entry(tar: TarIndex, marks: list[int], known: Any) -> list[Any]:
    if isinstance(known, list) and known[:-1] == marks:
        return known
    try:
        with tar.path.open("rb") as file:
            return [*marks, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        raise ConfigError(f"{tar.name}: cannot be read ({error.strerror})") from error


def _marks(tar: TarIndex) -> list[int]:
    """Values that change with a file: size and inode, then its times, in ns."""
    try:
        status = os.stat(tar.path)  # noqa: PTH116
    except OSError as error:
        raise ConfigError(f"{tar.name}: cannot be read ({error.strerror})") from error
    return [status.st_size] if tar.is_copy else [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _known(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
