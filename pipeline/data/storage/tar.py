"""Random access to the samples of one tar, by a scan of its headers.

Python's tarfile treats a damaged header as the end of the archive, so the samples after it would vanish silently. This
scan ends only at the end marker or with an error that names the byte.

A scan reads every header: 15,000 in a shard with 5,000 captioned and labelled images. So a shard ends with a table of
its members, which is a member with a name that webdataset's readers skip; a reader that knows its position reads only
it.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError

BLOCK = tarfile.BLOCKSIZE
# If a copy is evicted this often before it is opened, the cache is far too small.
FETCHES = 5
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
_REMARK = re.compile(r"__[^/]*__($|/)")
_PAX_RECORD = re.compile(rb"([0-9]{1,10}) ([^=\n]*)=")
# Tars are padded to full records of 20 blocks, or of more blocks by some writers.
PADDING = 4 * tarfile.RECORDSIZE
# Other contents of a file named like a tar, by its first bytes.
_NOT_A_TAR = {
    "a git-lfs pointer instead of the file; `git lfs pull` fetches it": re.compile(rb"version https://git-lfs"),
    "compressed by gzip, so it does not allow random access; `gunzip` it": re.compile(rb"\x1f\x8b"),
    "compressed, so it does not allow random access; unpack it to a plain tar": re.compile(
        rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd"
    ),
    "a zip archive and not a tar": re.compile(rb"PK\x03\x04"),
    "a web page and not a tar; look at its address and download it again": re.compile(
        rb"\s*<(!doctype html|html|\?xml)", re.IGNORECASE
    ),
}
# Largest number of bytes of a member's long name or pax header, which are read whole.
MAX_NAME = 2**20
# Members of a sample that a message names.
_NAMED = 6
# The member with the table of all others. webdataset treats __NAME__ as metadata of the archive.
TABLE = "__members__"


class TarError(ConfigError):
    """The tar is damaged or differs from its index. The message names the file and, if known, the byte."""


@dataclass(frozen=True)
class Member:
    """Position of the bytes of one file in the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
    """The files of one sample: adjacent members with one key."""

    key: str
    members: dict[str, Member]

    def __str__(self) -> str:
        """Its members, briefly, for a message."""
        # A damaged name may contain bytes that are not UTF-8, and messages are written to index.json.
        named = [ext.encode("utf-8", "backslashreplace").decode() for ext in sorted(self.members)]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        listed = ", ".join(named[:_NAMED]) + more
        if len(named) > 1 and all("." in name for name in named):
            # img.0001.jpg: whatever follows the first dot is the extension, so all of them are one sample.
            return f"{listed}; names are split at their first dot, so keys must have none: rename the files"
        return listed


class TarIndex:
    """The samples of a tar and their bytes. The file stays open until close(), or as long as the index is referenced.

    ``fetch`` returns the path again if the file is missing, such as an evicted copy in a cache; ``name`` is for
    messages. ``table`` is the position of the table of its members; None if it has none and its headers are read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fetch: Callable[[], Path] | None = None,
        name: str | None = None,
        table: Member | None = None,
    ) -> None:
        self.path, self.name = Path(path), name or str(path)
        self._fetch = fetch
        self._pid, self._fd = -1, -1
        self.samples = self._scan() if table is None else self._listed(table)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def is_copy(self) -> bool:
        """Whether the path is a copy in a cache, which has a separate path for every version of the file."""
        return self._fetch is not None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pid": -1}  # a copy opens the file itself

    def __del__(self) -> None:
        self.close()

    def read(self, sample: int, ext: str) -> bytes:
        """The bytes of a member; KeyError if the sample has no such member, TarError if the file ends early."""
        member = self.samples[sample].members[ext]
        data = os.pread(self._handle(), member.size, member.offset)
        if len(data) != member.size:
            key = self.samples[sample].key
            raise TarError(f"{self.name}: {key}.{ext} ends after {len(data)} of {member.size} bytes")
        return data

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._pid == os.getpid():
            os.close(self._fd)
            self._pid = -1

    def _handle(self) -> int:
        # Reads have an offset, so a handle from before a fork would work, but its owner would be unclear.
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

    def _listed(self, table: Member) -> list[TarSample]:
        """The samples in the table."""
        content = os.pread(self._handle(), table.size, table.offset)
        total = os.fstat(self._fd).st_size
        try:
            samples = [
                TarSample(key, {ext: Member(offset, size) for ext, (offset, size) in members.items()})
                for key, members in json.loads(content)
            ]
            ends = (member.offset + member.size for sample in samples for member in sample.members.values())
            if max(ends, default=0) > total:
                raise ValueError(f"names bytes behind the end at {total}")
        except (ValueError, TypeError, AttributeError) as error:
            where = f"the table of its members at byte {table.offset} is damaged"
            raise TarError(f"{self.name}: {where} ({error}); pack the source again") from error
        return samples

    def _scan(self) -> list[TarSample]:
        samples: list[TarSample] = []
        for name, member in _members(self._handle(), self.name):
            key, ext = split_name(name)
            if not key:
                continue
            if not samples or samples[-1].key != key:
                samples.append(TarSample(key, {}))
            if ext in samples[-1].members:
                raise TarError(f"{self.name}: {name} occurs twice")
            samples[-1].members[ext] = member
        return samples


def add_table(path: Path) -> Member:
    """Append the table of its members to a complete tar of regular files, in place; returns the table's position."""
    samples = TarIndex(path).samples
    rows = [[each.key, {ext: [m.offset, m.size] for ext, m in each.members.items()}] for each in samples]
    content = json.dumps(rows, separators=(",", ":")).encode("ascii")
    header = tarfile.TarInfo(TABLE)
    header.size = len(content)
    ends = (m.offset + m.size for each in samples for m in each.members.values())
    at = -(-max(ends, default=0) // BLOCK) * BLOCK
    with path.open("r+b") as file:
        file.seek(at)
        file.truncate()
        file.write(header.tobuf(tarfile.USTAR_FORMAT) + content)
        end = file.tell() + 2 * BLOCK  # the end marker
        file.truncate(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
    return Member(at + BLOCK, len(content))


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member as webdataset splits them: at the first dot of the last part, lower case.

    Two empty strings for members that webdataset skips: names without a dot, and metadata (``__meta__/..``).
    """
    match = _NAME.match(name)
    if match is None or _REMARK.match(name):
        return "", ""
    return match.group(1), match.group(2).lower()


def _members(fd: int, path: str) -> Iterator[tuple[str, Member]]:
    """Name and position of each regular file. Supports ustar, GNU long names, and pax path and size."""
    total, at = os.fstat(fd).st_size, 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        info = _header(fd, path, at, total)
        if info is None:
            _check_end(fd, path, at, total)
            return
        size, data = _size(pax, info, path, at), at + BLOCK
        if data + size > total:
            raise TarError(f"{path}: cut off inside {info.name!r}: {data + size} bytes needed, {total} there")
        if size > MAX_NAME and info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            raise TarError(f"{path}: damaged header at byte {at}: a name of {size} bytes")
        at = data + -(-size // BLOCK) * BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = os.pread(fd, size, data).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            pax = _pax_records(os.pread(fd, size, data), path, data)
        elif info.type != tarfile.XGLTYPE:
            name = long_name or pax.get("path", info.name)
            _check_kind(info, pax, path, name)
            if info.isreg():
                yield name, Member(data, size)
            long_name, pax = None, {}


def _size(pax: dict[str, str], info: tarfile.TarInfo, path: str, at: int) -> int:
    written = pax.get("size", str(info.size))
    if not written.isdecimal():
        raise TarError(f"{path}: damaged header at byte {at}: its size is {written[:20]!r}")
    return int(written)


def _check_kind(info: tarfile.TarInfo, pax: dict[str, str], path: str, name: str) -> None:
    """Refuse members whose bytes do not follow their header completely; their samples would lack them."""
    if not split_name(name)[0]:
        return
    if info.islnk() or info.issym():
        raise TarError(
            f"{path}: {name} is a link to {info.linkname}; make the tar with --dereference --hard-dereference"
        )
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
        raise TarError(f"{path}: {name} is a sparse file; make the tar without --sparse")


def _header(fd: int, path: str, at: int, total: int) -> tarfile.TarInfo | None:
    """The header at byte ``at``; None for the end marker, TarError for anything else."""
    block = os.pread(fd, BLOCK, at)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        # The exceptions that distinguish the end marker from damage are not public; the marker is a block of zeros.
        if len(block) == BLOCK and not block.strip(b"\0"):
            return None
        if at == 0:
            for kind, looks in _NOT_A_TAR.items():
                if looks.match(block):
                    raise TarError(f"{path}: {kind}") from error
        if len(block) < BLOCK:
            raise TarError(f"{path}: cut off at byte {at} of {total}, before its end marker") from error
        raise TarError(f"{path}: damaged header at byte {at}; the samples after it cannot be found") from error


def _check_end(fd: int, path: str, end: int, total: int) -> None:
    """After the end marker only zeros may follow, up to the next full record.

    Raises:
        TarError: There is more, as in tars joined by cat, or there are too many zeros, as in an unfinished download.
    """
    at = end
    while at < total:
        part = os.pread(fd, 2**20, at)
        if not part:
            return  # it shrinks while being read, and the reader will notice
        if rest := part.lstrip(b"\0"):
            more = at + len(part) - len(rest)
            raise TarError(
                f"{path}: ends at byte {end} and continues at byte {more} of {total}: several tars joined by cat, of "
                "which readers see only the first; join them by `tar --concatenate`, or keep them apart"
            )
        at += len(part)
    if total - end > PADDING:
        raise TarError(
            f"{path}: zeros from byte {end} to its end at {total}, more than a tar's padding: a partial download or "
            "copy; copy it again"
        )


def _pax_records(data: bytes, path: str, at: int) -> dict[str, str]:
    """The ``LENGTH KEY=VALUE\\n`` records of a pax header, which is at byte ``at``."""
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        found = _PAX_RECORD.match(data)
        if found is None or not found.end() <= int(found[1]) <= len(data):
            raise TarError(f"{path}: damaged pax header at byte {at}")
        value = data[found.end() : int(found[1])].rstrip(b"\n")
        records[found[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(found[1]) :]
    return records
