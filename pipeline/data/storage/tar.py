"""Random access to the samples of one tar, from a scan of its headers.

Python's tarfile takes a damaged header for the end of the archive, so the samples behind it would vanish without a
word. This scan knows two ends only: the end marker, and an error that names the byte.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError

BLOCK = tarfile.BLOCKSIZE
# A copy that is pushed out of its cache this often before it is opened has a cache that is far too small.
FETCHES = 5
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
_REMARK = re.compile(r"__[^/]*__($|/)")


class TarError(ConfigError):
    """The tar is damaged or not what its index says. The message names the file and, where known, the byte."""


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie in the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
    """The files of one sample: adjacent members with one key."""

    key: str
    members: dict[str, Member]


class TarIndex:
    """The samples of a tar and their bytes. The file stays open until close(), or until nobody holds the index.

    ``fetch`` gives the path anew when the file is gone, as a copy in a cache may be; ``name`` is what messages call it.
    """

    def __init__(self, path: str | Path, *, fetch: Callable[[], Path] | None = None, name: str | None = None) -> None:
        self.path, self.name = Path(path), name or str(path)
        self._fetch = fetch
        self._pid, self._fd = -1, -1
        self.samples = self._scan()

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pid": -1}  # a copy opens the file for itself

    def __del__(self) -> None:
        self.close()

    def read(self, sample: int, ext: str) -> bytes:
        """The bytes of a member; KeyError when the sample has no such member, TarError when the file ends early."""
        member = self.samples[sample].members[ext]
        data = os.pread(self._handle(), member.size, member.offset)
        if len(data) != member.size:
            key = self.samples[sample].key
            raise TarError(f"{self.name}: {key}.{ext} ends after {len(data)} of {member.size} bytes")
        return data

    def close(self) -> None:
        """Give the file back; the next read opens it again."""
        if self._pid == os.getpid():
            os.close(self._fd)
            self._pid = -1

    def _handle(self) -> int:
        # Reads name their offset, so a handle from before a fork would do, but then nobody knew who closes it.
        if self._pid != os.getpid():
            self._fd, self._pid = self._open(), os.getpid()
        return self._fd

    def _open(self) -> int:
        for _ in range(FETCHES if self._fetch else 0):
            try:
                return os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                assert self._fetch is not None
                self.path = self._fetch()
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise TarError(f"{self.name}: cannot be opened ({error.strerror})") from error

    def _scan(self) -> list[TarSample]:
        samples: list[TarSample] = []
        for name, member in _members(self._handle(), self.name):
            key, ext = split_name(name)
            if not key:
                continue
            if not samples or samples[-1].key != key:
                samples.append(TarSample(key, {}))
            if ext in samples[-1].members:
                raise TarError(f"{self.name}: {name} comes twice")
            samples[-1].members[ext] = member
        return samples


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member as webdataset splits them: at the first dot of the last part, lower case.

    Two empty strings for what webdataset skips: names without a dot, and remarks about the archive (``__meta__/..``).
    """
    match = _NAME.match(name)
    if match is None or _REMARK.match(name):
        return "", ""
    return match.group(1), match.group(2).lower()


def _members(fd: int, path: str) -> Iterator[tuple[str, Member]]:
    """Name and place of each regular file. Understands ustar, GNU long names, and pax path and size."""
    total, at = os.fstat(fd).st_size, 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        info = _header(fd, path, at, total)
        if info is None:
            return
        size, data = int(pax.get("size", info.size)), at + BLOCK
        if data + size > total:
            raise TarError(f"{path}: cut off inside {info.name!r}: {data + size} bytes needed, {total} there")
        at = data + -(-size // BLOCK) * BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = os.pread(fd, size, data).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            pax = _pax_records(os.pread(fd, size, data))
        elif info.type != tarfile.XGLTYPE:
            if info.isreg():
                yield long_name or pax.get("path", info.name), Member(data, size)
            long_name, pax = None, {}


def _header(fd: int, path: str, at: int, total: int) -> tarfile.TarInfo | None:
    """The header at byte ``at``; None for the end marker, TarError for anything else."""
    try:
        return tarfile.TarInfo.frombuf(os.pread(fd, BLOCK, at), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        # The classes that tell the end marker from damage are not public; the marker is a block of zeros.
        block = os.pread(fd, BLOCK, at)
        if len(block) == BLOCK and not block.strip(b"\0"):
            return None
        if len(block) < BLOCK:
            raise TarError(f"{path}: cut off at byte {at} of {total}, before its end marker") from error
        raise TarError(f"{path}: damaged header at byte {at}; the samples behind it cannot be found") from error


def _pax_records(data: bytes) -> dict[str, str]:
    """The ``LENGTH KEY=VALUE\\n`` records of a pax header."""
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records
