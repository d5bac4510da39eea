"""A folder of shards, on this disk or behind a URL: its small texts and its tars, through the same functions."""

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

# Tars of an evaluation set that are fetched at once.
AT_ONCE = 4
# Of an address that was kept with *** in the place of its password.
STORE_PASSWORD = "SELORA_STORE_PASSWORD"


class Folder(Protocol):
    """``location`` is what messages call it, ``name`` its last part."""

    @property
    def location(self) -> str: ...

    @property
    def name(self) -> str: ...

    def exists(self) -> bool:
        """False if the folder is known not to exist."""
        ...

    def read_text(self, path: str) -> str | None:
        """A small file; None where there is none."""
        ...

    def tars(self, path: str) -> list[str]:
        """The names of the tars in a folder of it; none where a store is not listed."""
        ...

    def open_tar(
        self, path: str, *, size: int | None = None, sha256: str | None = None, table: Member | None = None
    ) -> TarIndex:
        """A tar, at hand for reading. What is known of it is checked when it is fetched. Raises ConfigError.

        Args:
            path: inside the folder.
            size: in bytes, where it is known.
            sha256: where it is known.
            table: where the tar has the table of its members; None: its headers are read.
        """
        ...

    @property
    def cache(self) -> Cache | None:
        """Where copies of its tars are kept; None where they are read in place."""
        ...

    def fetch(self, path: str, *, size: int, sha256: str) -> None:
        """Have a tar at hand before it is opened, unless another process is just fetching it. Raises ConfigError."""
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
    """Texts are read anew each time; tars are copied into ``cache`` and fetched again if they are pushed out of it."""

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
    """The folder that a path, a URL or a dataset of the hub names; see remote.py for URLs and the default cache."""
    if isinstance(location, str) and is_remote(location):
        place = remote_place(_with_password(location))
        return RemoteFolder(redact(location), place, cache or Cache.from_environment())
    return LocalFolder(Path(location))


def _with_password(location: str) -> str:
    """A location as it was kept, its password from the environment where it was left out as ***."""
    if MASK not in location:
        return location
    password = os.environ.get(STORE_PASSWORD)
    if password is None:
        raise ConfigError(
            f"{location}: its password is not stored; give it by {STORE_PASSWORD}, or the whole address again"
        )
    return location.replace(MASK, quote(password, safe=""))


def open_tars(folder: Folder, paths: Sequence[str]) -> tuple[TarIndex, ...]:
    """Several tars, fetched side by side where they are fetched. Raises the error of the first that has one."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        opened = [pool.submit(folder.open_tar, path) for path in paths]
        try:
            return tuple(future.result() for future in opened)
        except ConfigError:
            for future in opened:
                future.cancel()
            raise
