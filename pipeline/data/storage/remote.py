"""Local copies of files behind a URL, fetched once per node; interrupted fetches resume, and their size is limited.

A location is a folder, any fsspec URL (s3://, gs://, https://, file://, memory://) or a dataset of the hub, written
``hf:ORG/NAME[@REVISION]`` or as its page. The cache belongs to the machine, not to a run, so environment variables set
it: SELORA_CACHE (default ~/.cache/selora) and SELORA_CACHE_GB (default 100). AWS_ENDPOINT_URL_S3 names an S3 store
other than Amazon's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
from filelock import FileLock, Timeout

from pipeline.config import ConfigError
from pipeline.data.storage.cache import Cache, entry_of, lock_of, touch
from pipeline.data.storage.cache_budget import room_to_fetch
from pipeline.files import sha256_of
from pipeline.passwords import redact

CHUNK = 8 * 2**20
_WARN_FROM = 3  # failures in a row after which the log gets a line
PUBLIC_HUB = "https://huggingface.co"
_HUB = re.compile(
    r"(?:hf:(?!//)|(?P<endpoint>https?://[^/]+)/datasets/)(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/?"
)
_BUSY = (408, 425, 429)
# The package that a store needs in addition to fsspec, and the source of its credentials.
_STORES: Mapping[str, tuple[str, str]] = {
    "s3": ("pip install 'selora[s3]'", "AWS_* in the environment or ~/.aws"),
    "gs": ("pip install 'selora[gcs]'", "GOOGLE_APPLICATION_CREDENTIALS or gcloud"),
    "gcs": ("pip install 'selora[gcs]'", "GOOGLE_APPLICATION_CREDENTIALS or gcloud"),
    "http": ("pip install aiohttp", "HF_TOKEN for the hub"),
    "https": ("pip install aiohttp", "HF_TOKEN for the hub"),
}
T = TypeVar("T")

logger = logging.getLogger("selora.data")
_counting = threading.Lock()
_retries = 0
_AWAY_S = 60.0
_given_up: dict[str, tuple[int, float]] = {}  # store: (number of failures in a row, time of the last one)


def retries() -> int:
    """Number of requests that this process has repeated because a store failed or sent wrong content."""
    return _retries


class MissingError(ConfigError):
    """The store has no such file."""


@dataclass(frozen=True)
class RemotePlace:
    """A folder behind a URL.

    ``texts`` and ``files`` are the addresses of its small and its large files, which differ on the hub.
    """

    name: str
    texts: str
    files: str


def is_remote(location: str | Path) -> bool:
    """Whether a location is behind a URL; a path is not, and a pathlib.Path never is."""
    return isinstance(location, str) and ("://" in location or location.startswith("hf:"))


def remote_place(location: str) -> RemotePlace:
    """The parts of a remote location."""
    found = _HUB.fullmatch(location)
    if found is None or found["endpoint"] not in (None, _hub(), PUBLIC_HUB):
        plain = location.rstrip("/")
        return RemotePlace(plain.rpartition("/")[2], plain, plain)
    base, revision = f"{found['endpoint'] or _hub()}/datasets/{found['name']}", found["revision"] or "main"
    return RemotePlace(found["name"].rpartition("/")[2], f"{base}/raw/{revision}", f"{base}/resolve/{revision}")


def local_copy(
    url: str, cache: Cache, *, size: int | None = None, sha256: str | None = None, wait: bool = True
) -> Path:
    """The path of a local copy of the file behind ``url``, fetched unless the cache has it.

    With ``sha256`` the copy is checked when it is fetched, and found again without a request; otherwise it is found by
    the size and version that the store reports. Another process may evict the copy at any time, so open it at once and
    call again if it is missing. Without ``wait`` a file that another process is fetching is left to it, and the path
    need not exist yet. Raises ConfigError with the URL.
    """
    version = sha256
    if version is None or size is None:
        info = _info(url, cache.attempts)
        size, version = info.get("size"), version or _version(info)
    path = entry_of(cache, url, version, _file_name(url))
    try:
        if touch(path):
            return path
        with FileLock(lock_of(cache, path), blocking=wait):
            if touch(path):
                return path
            _fetch(url, path, cache, size, sha256)
            touch(path)
    except Timeout:
        return path
    except OSError as error:
        raise ConfigError(
            f"{url}: cannot be kept in {cache.directory}: {error.strerror or error}; name a place with "
            "SELORA_CACHE and a size with SELORA_CACHE_GB"
        ) from error
    return path


def _fetch(url: str, path: Path, cache: Cache, size: int | None, sha256: str | None) -> None:
    """Write ``path`` completely or not at all. An interrupted fetch is continued, unless its content is wrong."""
    part = path.with_name(path.name + ".part")
    for last in (False, True):
        found = _fetched(url, path, part, cache, size, sha256)
        if found == sha256:
            return
        wrong = f"its content is not what its index says (sha256 {found}, not {sha256})"
        if last:
            raise ConfigError(f"{url}: {wrong}")
        _note_retry(url, wrong, _WARN_FROM)


def _fetched(url: str, path: Path, part: Path, cache: Cache, size: int | None, sha256: str | None) -> str | None:
    """Fetch once and keep the file if its content is correct; returns the sha256 found, None if none is expected."""
    whole = None
    if size is None:  # the store does not report it, so the file is fetched in one piece
        whole = read_bytes(url, cache.attempts)
        size = len(whole)
    # Held during the renaming, because a file cannot be counted while its name changes.
    with room_to_fetch(cache, url, path.parent, size):
        part.parent.mkdir(parents=True, exist_ok=True)
        if whole is None:
            _download(url, part, cache.attempts, size)
        else:
            part.write_bytes(whole)
        found = None if sha256 is None else sha256_of(part)
        if found == sha256:
            part.replace(path)
        else:
            part.unlink()
        return found


def _download(url: str, part: Path, attempts: int, size: int) -> None:
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    with part.open("ab") as file:
        while (at := file.tell()) < size:
            file.write(read_bytes(url, attempts, (at, min(at + CHUNK, size))))
            # Data on the disk survives a killed process and is not fetched again.
            file.flush()
        os.fsync(file.fileno())


def read_bytes(url: str, attempts: int, span: tuple[int, int] | None = None) -> bytes:
    """The bytes [span[0], span[1]) of a file, or as many of them as were received; the whole file without a span.

    Raises MissingError if there is no such file, and ConfigError with the URL if it cannot be read.
    """

    def once() -> bytes:
        store, path = _store(url)
        if span is None:
            return store.cat_file(path)
        data = store.cat_file(path, start=span[0], end=span[1])
        if len(data) > span[1] - span[0]:
            # A server without support for ranges sends the whole file.
            data = data[span[0] : span[1]]
        if not data:
            raise EOFError(f"no bytes at {span[0]}")
        return data

    return _retried(url, attempts, once)


def _info(url: str, attempts: int) -> dict[str, Any]:
    def once() -> dict[str, Any]:
        store, path = _store(url)
        return store.info(path)

    return _retried(url, attempts, once)


def _store(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        # Compressed answers would have lengths other than the store reports.
        options["headers"] = {"Accept-Encoding": "identity"}
        token = os.environ.get("HF_TOKEN")
        if token and url.startswith(_hub() + "/"):
            options["headers"]["Authorization"] = f"Bearer {token}"
    fsspec.asyn.get_loop().set_exception_handler(_on_loop_error)
    if protocol != "s3":
        return fsspec.core.url_to_fs(url, **options)
    # By default botocore and s3fs retry on their own, 125 times in all and silently.
    store, path = fsspec.core.url_to_fs(url, config_kwargs={"retries": {"total_max_attempts": 1}})
    store.retries = 1
    return store, path


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Ignore errors that a broken connection leaves in tasks of the store's library; the request itself has failed."""
    if "never retrieved" in context.get("message", ""):
        logger.debug("%s: %r", context["message"], context.get("exception"))
    else:
        loop.default_exception_handler(context)


def _retried(url: str, attempts: int, once: Callable[[], T]) -> T:
    """The result of ``once``, retried with growing pauses (a minute over 9 attempts) while the store fails.

    A store that has just failed in all attempts for another file, such as a prefetched shard, is tried once.
    """
    store = url.partition("://")[0] + "://" + url.partition("://")[2].partition("/")[0]
    before, when = _given_up.get(store, (0, 0.0))
    if before and time.monotonic() - when < _AWAY_S:
        attempts = 1
    else:
        before = 0
    for attempt in range(1, attempts + 1):
        try:
            result = once()
            _given_up.pop(store, None)
            return result
        # Every store's library has its own errors, most of which are not an OSError.
        except Exception as error:
            refusal = _refusal(url, error)
            if refusal is not None:
                raise refusal from error
            if attempt == attempts:
                _given_up[store] = before + attempts, time.monotonic()
                raise ConfigError(
                    f"{url}: failed {before + attempts} times, last with {type(error).__name__}: {error}; the "
                    "received part is kept, so the same command continues when the store answers again"
                ) from error
            _note_retry(url, f"{type(error).__name__}: {error}", attempt)
            time.sleep(min(0.2 * 2 ** (attempt - 1), 30))
    raise AssertionError("attempts is at least 1")


def _note_retry(url: str, reason: str, failures: int) -> None:
    global _retries
    with _counting:
        _retries += 1
    level = logging.WARNING if failures >= _WARN_FROM else logging.INFO
    plural = "s"[: failures > 1]
    logger.log(level, "%s: failed %d time%s in a row, asking again (%s)", redact(url), failures, plural, redact(reason))


def _refusal(url: str, error: Exception) -> ConfigError | None:
    """The error to raise if a retry cannot help."""
    protocol = url.partition("://")[0]
    install, credentials = _STORES.get(protocol, ("its fsspec package", "the store's own settings"))
    if isinstance(error, ImportError):
        return ConfigError(f"{url}: reading it needs another package ({error}); {install}")
    # fsspec's http reports "not found" for any failure of both requests for the size; its cause is more precise.
    blurred = protocol in ("http", "https") and isinstance(error, FileNotFoundError) and error.__cause__ is not None
    cause = error.__cause__ if blurred else error
    status = getattr(cause, "status", None) or getattr(cause, "code", None)
    if status == 404 or (isinstance(cause, FileNotFoundError | IsADirectoryError) and not blurred):
        return MissingError(f"{url}: no such file; look for a mistyped location or an upload that is not complete")
    # The stores' libraries share this word, but no class.
    if isinstance(cause, PermissionError) or status in (401, 403) or "Credentials" in type(cause).__name__:
        return ConfigError(f"{url}: access refused ({cause}); credentials are taken from {credentials}")
    if isinstance(cause, ValueError) or (isinstance(status, int) and 400 <= status < 500 and status not in _BUSY):
        return ConfigError(f"{url}: cannot be read ({type(cause).__name__}: {cause})")
    return None


def _version(info: Mapping[str, Any]) -> str:
    """A value that changes with the file behind a URL, from the store's information about it."""
    marks = ("size", "ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime", "created")
    return repr([(mark, str(info[mark])) for mark in marks if info.get(mark) is not None])


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", PUBLIC_HUB).rstrip("/")


def _file_name(url: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", url.partition("?")[0].rstrip("/").rpartition("/")[2]) or "file"
