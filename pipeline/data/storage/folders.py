"""Folders of shards, local or behind a URL, with one interface to their small texts and their tars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from pipeline.config import ConfigError
from pipeline.config.text_file import decode_text, read_text
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.remote import MissingError, RemotePlace, is_remote, local_copy, read_bytes, remote_place
from pipeline.data.storage.tar import Member, TarIndex
from pipeline.passwords import MASK, redact

# Tars of an evaluation set that are fetched in parallel.
AT_ONCE = 4
# Password of a stored address, which has *** in its place.
STORE_PASSWORD = "SELORA_STORE_PASSWORD"


class Folder(Protocol):
    """``location`` is its name in messages, ``name`` its last part."""

    @property
    def location(self) -> str: ...

    @property
    def name(self) -> str: ...

    def exists(self) -> bool:
        """False if the folder is known not to exist."""
        ...

    def read_text(self, path: str) -> str | None:
        """A small file; None if it does not exist."""
        ...

    def tars(self, path: str) -> list[str]:
        """The names of the tars in a subfolder; empty for a store that cannot be listed."""
        ...

    def open_tar(
        self, path: str, *, size: int | None = None, sha256: str | None = None, table: Member | None = None
    ) -> TarIndex:
        """A tar, ready for reading. Known facts about it are checked when it is fetched. Raises ConfigError.

        Args:
            path: path inside the folder.
            size: size in bytes, if known.
            sha256: digest, if known.
            table: position of the table of its members; None: its headers are read.
        """
        ...

    @property
    def cache(self) -> Cache | None:
        """The cache for copies of its tars; None if they are read in place."""
        ...

    def fetch(self, path: str, *, size: int, sha256: str) -> None:
        """Fetch a tar before it is opened, unless another process is fetching it. Raises ConfigError."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a disk."""

    path: Path

    @property
    def location(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def exists(self) -> bool:
        return self.path.is_dir()

    def read_text(self, path: str) -> str | None:
        file = self.path / path
        return read_text(file) if file.is_file() else None

    def tars(self, path: str) -> list[str]:
        return sorted(file.name for file in (self.path / path).glob("*.tar"))

    def open_tar(
        self,
        path: str,
        *,
        size: int | None = None,  # noqa: ARG002
        sha256: str | None = None,  # noqa: ARG002
        table: Member | None = None,
    ) -> TarIndex:
        return TarIndex(self.path / path, table=table)

    @property
    def cache(self) -> None:
        return None

    def fetch(self, path: str, *, size: int, sha256: str) -> None: ...


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. Texts are read each time; tars are copied into ``cache`` and fetched again if evicted."""

    location: str
    place: RemotePlace
    cache: Cache

    @property
    def name(self) -> str:
        return self.place.name

    def exists(self) -> bool:
        return True

    def read_text(self, path: str) -> str | None:
        try:
            name = f"{self.place.texts}/{path}"
            return decode_text(read_bytes(name, self.cache.attempts), name)
        except MissingError:
            return None

    def tars(self, path: str) -> list[str]:  # noqa: ARG002
        return []

    def open_tar(
        self, path: str, *, size: int | None = None, sha256: str | None = None, table: Member | None = None
    ) -> TarIndex:
        url = f"{self.place.files}/{path}"
        fetch = partial(local_copy, url, self.cache, size=size, sha256=sha256)
        return TarIndex(fetch(), fetch=fetch, name=redact(url), table=table)

    def fetch(self, path: str, *, size: int, sha256: str) -> None:
        local_copy(f"{self.place.files}/{path}", self.cache, size=size, sha256=sha256, wait=False)


def folder_at(location: str | Path, cache: Cache | None = None) -> Folder:
    """The folder at a path, a URL or a dataset of the hub; see remote.py for URLs and the default cache."""
    if isinstance(location, str) and is_remote(location):
        place = remote_place(_with_password(location))
        return RemoteFolder(redact(location), place, cache or Cache.from_environment())
    return LocalFolder(Path(location))


def _with_password(location: str) -> str:
    """A stored location; its password, stored as ***, comes from the environment."""
    if MASK not in location:
        return location
    password = os.environ.get(STORE_PASSWORD)
    if password is None:
        raise ConfigError(
            f"{location}: its password is not stored; give it by {STORE_PASSWORD}, or the whole address again"
        )
    return location.replace(MASK, quote(password, safe=""))


def open_tars(folder: Folder, paths: Sequence[str]) -> tuple[TarIndex, ...]:
    """Several tars, fetched in parallel if they are remote. Raises the first error in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        opened = [pool.submit(folder.open_tar, path) for path in paths]
        try:
            return tuple(future.result() for future in opened)
        except ConfigError:
            for future in opened:
                future.cancel()
            raise
