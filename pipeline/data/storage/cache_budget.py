"""Room in the cache is promised before it is written, so that what many processes write at once stays under one bound.

    CACHE/locks/room.lock        held while room is counted and promised, never while something is fetched or decoded
    CACHE/promised/<uuid>        what an entry may grow to; its process holds a lock on it

An entry counts with what it takes of the disk or with what it was promised, whichever is more. A promise whose lock
nobody holds is void, so it ends with its process, however that ends.
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

# How long a fetch waits for others to end before it goes over the bound.
WAIT_S = 600.0
PAGE = 4096
_POLL_S = 0.2
_FETCH = "fetch"

logger = logging.getLogger("selora.data")


def on_disk(pages: int) -> int:
    """The bytes that a file with so many pages may take; a file system needs some for its own records."""
    return PAGE * (pages + pages // 256 + 1) if pages else 0


class Promise:
    """Room for one entry. Given back by close(), when nobody holds the promise any more, and with its process.

    Forked processes hold it as well; a pickled copy only refers to it.
    """

    def __init__(self, file: Path, fd: int) -> None:
        self._file, self._fd, self._pid = file, fd, os.getpid()

    def stands(self) -> bool:
        """False once it was given back, or taken for a fetched file."""
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
    """Room for the entry ``folder`` to become a file of ``size`` bytes.

    The oldest used entries leave for it, then images that are just being decoded, for they can do without. Where other
    fetches have all the rest it waits for one to end; after ten minutes of that it goes over the bound with a warning,
    by this one file: a store that hangs for one user should not end the training of another. Raises ConfigError when
    the whole cache could not hold the file.
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
            logger.warning("%s: waits for other fetches, which take as much as SELORA_CACHE_GB allows", url)
            reported = True
        time.sleep(_POLL_S)


def room_to_decode(cache: Cache, folder: Path, more: Callable[[], int], share: str) -> Promise | None:
    """Room for the entry ``folder`` to grow by ``more()`` bytes; None at once where writers have it.

    Those who come with one ``share`` write the same, so their room is counted once. A fetch may take the promise away.
    """
    return _promise(cache, lambda: _Wanted(folder.name, _use(_files(folder)) + more(), share))


def unwritten(cache: Cache) -> int:
    """The bytes that are promised and not on the disk yet."""
    with FileLock(_room_lock(cache)):
        return sum(entry.size - entry.held for entry in _count(cache, _standing(cache)))


@dataclass(frozen=True)
class _Wanted:
    """As a promise's file holds it: an entry may take ``bytes`` of the disk."""

    entry: str
    bytes: int
    share: str


@dataclass(frozen=True)
class _Entry:
    """``held``: bytes on the disk, ``size``: those or the promised, ``promises``: their files and for whom they are."""

    folder: Path
    used: float
    held: int
    size: int
    promises: tuple[tuple[Path | None, str], ...]

    @property
    def turn(self) -> tuple[bool, float]:
        """Who leaves first."""
        return bool(self.promises), self.used


def _promise(cache: Cache, ask: Callable[[], _Wanted], *, over: bool = False) -> Promise | None:
    """Room for what ``ask`` says while nobody else counts; None where what may leave for it is not enough."""
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
    """The bytes that came free."""
    try:
        with FileLock(lock_of(cache, entry.folder / "any"), blocking=False):
            shutil.rmtree(entry.folder, ignore_errors=True)
    except Timeout:  # another process is reading it, or begins to fetch it
        return 0
    for file, _ in entry.promises:
        assert file is not None, "the promise that is asked for now is for an entry that stays"
        file.unlink(missing_ok=True)
    return entry.size - _use(_files(entry.folder))


def _warn_over(cache: Cache, lacking: int) -> None:
    logger.warning(
        "%s: goes over SELORA_CACHE_GB by %.3g GB: for %d minutes others have been fetching as much as it allows; "
        "raise it",
        cache.directory, lacking / 1e9, WAIT_S // 60,
    )  # fmt: skip


def _count(cache: Cache, promises: Iterable[tuple[Path | None, _Wanted]]) -> list[_Entry]:
    """All entries, those included of which there is only a promise."""
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
    # Another process may remove any of them in this moment; what it held is counted as gone.
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            with suppress(FileNotFoundError):
                found.append(file.stat())
    return found


def _use(files: Iterable[os.stat_result]) -> int:
    """What they take of the disk: files of decoded images have holes."""
    return sum(512 * status.st_blocks for status in files)


def _standing(cache: Cache) -> Iterator[tuple[Path, _Wanted]]:
    """The promises whose holders live; the others are cleared away."""
    for file in (cache.directory / "promised").glob("*"):
        try:
            fd = os.open(file, os.O_RDONLY)
        except FileNotFoundError:  # given back in this moment
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
