"""Reservations of cache space, made before writing, so that many concurrent processes stay within one limit.

    CACHE/locks/room.lock        held while space is counted and reserved, never while something is fetched or decoded
    CACHE/promised/<uuid>        the size to which an entry may grow; its process holds a lock on it

An entry counts with its space on the disk or its reservation, whichever is larger. A reservation (`Promise`) whose lock
is free is void, so it ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config import ConfigError
from pipeline.data.storage.cache import Cache, lock_of

# Seconds that a fetch waits for others before it exceeds the limit.
WAIT_S = 600.0
PAGE = 4096
_POLL_S = 0.2
_FETCH = "fetch"

logger = logging.getLogger("selora.data")


def on_disk(pages: int) -> int:
    """The bytes that a file with this many pages may take, including the file system's own records."""
    return PAGE * (pages + pages // 256 + 1) if pages else 0


class Promise:
    """A reservation for one entry. It ends with close(), with its last reference, and with its process.

    Forked processes share it; a pickled copy only refers to it.
    """

    def __init__(self, file: Path, fd: int) -> None:
        self._file, self._fd, self._pid = file, fd, os.getpid()

    def stands(self) -> bool:
        """False once it has been released, or taken for a fetched file."""
        return self._file.exists()

    def close(self) -> None:
        if self._pid == os.getpid():
            self._pid = -1
            self._file.unlink(missing_ok=True)
            os.close(self._fd)

    def __enter__(self) -> Promise:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pid": -1}


def room_to_fetch(cache: Cache, url: str, folder: Path, size: int) -> Promise:
    """Reserve space for the entry ``folder`` to become a file of ``size`` bytes.

    The oldest used entries are removed for it, then images that are just being decoded, which are optional. If other
    fetches have all the rest, it waits for one to end. After ten minutes it exceeds the limit by this one file, with a
    warning, because a store that hangs for one user should not end the training of another. Raises ConfigError if the
    file is larger than the whole cache.
    """
    wanted = _Wanted(folder.name, on_disk(-(-size // PAGE)), _FETCH)
    if wanted.bytes > cache.max_bytes:
        raise ConfigError(
            f"{url}: {size} bytes are more than the whole cache may hold ({cache.max_bytes}); raise SELORA_CACHE_GB"
        )
    start, reported = time.monotonic(), False
    while True:
        promise = _promise(cache, lambda: wanted, over=time.monotonic() - start >= WAIT_S)
        if promise is not None:
            return promise
        if not reported:
            logger.warning("%s: waits for other fetches, which use all of SELORA_CACHE_GB", url)
            reported = True
        time.sleep(_POLL_S)


def room_to_decode(cache: Cache, folder: Path, more: Callable[[], int], share: str) -> Promise | None:
    """Reserve space for the entry ``folder`` to grow by ``more()`` bytes; returns None at once if writers hold it.

    Reservations with the same ``share`` are for the same bytes, so they count once. A fetch may take a reservation
    away.
    """
    return _promise(cache, lambda: _Wanted(folder.name, _use(_files(folder)) + more(), share))


def unwritten(cache: Cache) -> int:
    """The bytes that are reserved but not on the disk yet."""
    with FileLock(_room_lock(cache)):
        return sum(entry.size - entry.held for entry in _count(cache, _standing(cache)))


@dataclass(frozen=True)
class _Wanted:
    """Content of a reservation's file: an entry may take ``bytes`` of the disk."""

    entry: str
    bytes: int
    share: str


@dataclass(frozen=True)
class _Entry:
    """``held``: bytes on the disk, ``size``: the same or the reserved ones, ``promises``: their files and purposes."""

    folder: Path
    used: float
    held: int
    size: int
    promises: tuple[tuple[Path | None, str], ...]

    @property
    def turn(self) -> tuple[bool, float]:
        """Sort key: the first entry to be removed."""
        return bool(self.promises), self.used


def _promise(cache: Cache, ask: Callable[[], _Wanted], *, over: bool = False) -> Promise | None:
    """Reserve space as ``ask`` returns under the lock; None if too little can be removed for it."""
    with FileLock(_room_lock(cache)):
        wanted = ask()
        entries = _count(cache, [*_standing(cache), (None, wanted)])
        lacking = sum(entry.size for entry in entries) - cache.max_bytes
        leaving = sorted((entry for entry in entries if _may_leave(entry, wanted)), key=lambda entry: entry.turn)
        if lacking > sum(entry.size for entry in leaving) and not over:
            return None
        for entry in leaving:
            if lacking > 0:
                lacking -= _remove(cache, entry)
        if lacking > 0 and not over:
            return None
        if lacking > 0:
            _warn_over(cache, lacking)
        return _write(cache, wanted)


def _may_leave(entry: _Entry, wanted: _Wanted) -> bool:
    return entry.folder.name != wanted.entry and all(wanted.share == _FETCH != share for _, share in entry.promises)


def _remove(cache: Cache, entry: _Entry) -> int:
    """Remove an entry; returns the freed bytes."""
    try:
        with FileLock(lock_of(cache, entry.folder / "any"), blocking=False):
            shutil.rmtree(entry.folder, ignore_errors=True)
    except Timeout:  # another process is reading it, or starts to fetch it
        return 0
    for file, _ in entry.promises:
        assert file is not None, "an entry with a new reservation is not removed"
        file.unlink(missing_ok=True)
    return entry.size - _use(_files(entry.folder))


def _warn_over(cache: Cache, lacking: int) -> None:
    logger.warning(
        "%s: exceeds SELORA_CACHE_GB by %.3g GB, because for %d minutes other fetches have used all of it; raise it",
        cache.directory, lacking / 1e9, WAIT_S // 60,
    )  # fmt: skip


def _count(cache: Cache, promises: Iterable[tuple[Path | None, _Wanted]]) -> list[_Entry]:
    """All entries, including those that are only reserved."""
    by_entry: defaultdict[str, list[tuple[Path | None, _Wanted]]] = defaultdict(list)
    for file, wanted in promises:
        by_entry[wanted.entry].append((file, wanted))
    files = cache.directory / "files"
    names = {folder.name for folder in files.glob("*")} | by_entry.keys()
    return [_entry(files / name, by_entry[name]) for name in names]


def _entry(folder: Path, promises: Sequence[tuple[Path | None, _Wanted]]) -> _Entry:
    shares: defaultdict[str, int] = defaultdict(int)
    for _, wanted in promises:
        shares[wanted.share] = max(shares[wanted.share], wanted.bytes)
    files = _files(folder)
    held, used = _use(files), max((status.st_mtime for status in files), default=0.0)
    size = max(held, sum(shares.values()))
    return _Entry(folder, used, held, size, tuple((file, wanted.share) for file, wanted in promises))


def _files(folder: Path) -> list[os.stat_result]:
    found: list[os.stat_result] = []
    # Another process may remove any of them at this moment; they then count as 0.
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            with suppress(FileNotFoundError):
                found.append(file.stat())
    return found


def _use(files: Iterable[os.stat_result]) -> int:
    """The disk space of files; those of decoded images are sparse."""
    return sum(512 * status.st_blocks for status in files)


def _standing(cache: Cache) -> Iterator[tuple[Path, _Wanted]]:
    """The valid reservations; the others are removed."""
    for file in (cache.directory / "promised").glob("*"):
        try:
            fd = os.open(file, os.O_RDONLY)
        except FileNotFoundError:  # released at this moment
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield file, _Wanted(**json.loads(os.read(fd, PAGE)))
        else:
            file.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _write(cache: Cache, wanted: _Wanted) -> Promise:
    file = cache.directory / "promised" / uuid.uuid4().hex
    file.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    promise = Promise(file, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, json.dumps(asdict(wanted)).encode())
    except OSError:
        promise.close()
        raise
    return promise


def _room_lock(cache: Cache) -> Path:
    return lock_of(cache, Path("room/any"))
