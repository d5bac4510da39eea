"""The tracking interface of a training: five calls that return immediately and never fail because of a server."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from pipeline.config import ConfigError
from pipeline.files import sha256_of
from pipeline.passwords import redact
from pipeline.tracking.environment import environment_tags
from pipeline.tracking.identity import ensure_identity
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow.delivery import load_state, pending
from pipeline.tracking.mlflow.moved import found_again
from pipeline.tracking.mlflow.shipper import LOG_FILE, Shipper
from pipeline.tracking.mlflow.uris import PasswordMissing, checked_uri, sqlite_path, with_password

__all__ = ["NullTracker", "RunTracker", "Status", "Tracker", "environment_tags", "open_tracker", "watch_machine"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
SHIPPED_VARIABLE = "SELORA_SHIPPED"  # set if a process of the parent run also ships this one
_WATCH_SECONDS = 15.0
_SERVER_WAIT_SECONDS = 20.0
_AWAY_WAIT_SECONDS = 6.0  # seconds for a last short attempt at a server that was away
_FILE_WAIT_SECONDS = 60.0  # a local SQLite file is never away, only slow: a busy machine creates it in 15 s

logger = logging.getLogger("selora.tracking")


class Tracker(Protocol):
    """Receiver of a run's metrics, params, tags and files."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values at one step; a value at a step that its key has already passed is a repetition and is dropped."""

    def params(self, values: Mapping[str, object]) -> None:
        """The settings that the run was started with."""

    def tags(self, values: Mapping[str, object]) -> None:
        """Facts about the run; a later value replaces an earlier one."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or a directory of files, uploaded as it is on the disk at the time of the upload."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Record how the run ended; nothing may be written afterwards."""


class NullTracker:
    """For the ranks that do not write."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def params(self, values: Mapping[str, object]) -> None: ...

    def tags(self, values: Mapping[str, object]) -> None: ...

    def artifact(self, path: Path, folder: str = "") -> None: ...

    def finish(self, status: Status = "FINISHED") -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class RunTracker:
    """The journal, and the process that ships it to MLflow."""

    def __init__(
        self, run_dir: Path, journal: Journal, uri: str | None, shipper: Shipper | None, *, owns_status: bool = True
    ) -> None:
        self.run_dir = run_dir
        self._owns_status = owns_status
        self._journal, self._uri, self._shipper = journal, uri, shipper
        self._watched_at = time.monotonic()
        self._said: str | None = None
        self._over = False

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._journal.metrics(step, values)
        self._watch()

    def params(self, values: Mapping[str, object]) -> None:
        self._journal.write("params", values=_texts(values))

    def tags(self, values: Mapping[str, object]) -> None:
        self._journal.write("tags", values=_texts(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        path = Path(path).absolute()
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self.artifact(child, f"{folder}/{path.name}".lstrip("/"))
            return
        try:
            digest = sha256_of(path)
        except OSError as error:
            logger.warning("%s is not recorded: %s", path, error.strerror)
            return
        self._journal.write(
            "artifact", path=os.path.relpath(path, self.run_dir), sha256=digest, folder=folder.strip("/")
        )

    def finish(self, status: Status = "FINISHED") -> None:
        """Record the end and give the delivery a limited time; one line reports what is left."""
        if self._over:
            return
        self._over = True
        if self._owns_status:
            self._journal.write("status", status=status)
        if self._journal.replayed:
            logger.info("%d values of repeated steps were already in the journal", self._journal.replayed)
        self._journal.close()
        if self._shipper is None:
            return
        self._shipper.finish(self._patience())
        if self._uri is not None:
            self._say_pending(self._uri, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _patience(self) -> float:
        """Seconds to wait for the end of the delivery."""
        if self._uri is None:
            return _SERVER_WAIT_SECONDS
        if sqlite_path(self._uri) is not None:
            return _FILE_WAIT_SECONDS
        return _SERVER_WAIT_SECONDS if load_state(self.run_dir, self._uri).error is None else _AWAY_WAIT_SECONDS

    def _watch(self) -> None:
        """Report once when the store goes away and once when it is back; reads a local file, never the network."""
        now = time.monotonic()
        if self._uri is None or now - self._watched_at < _WATCH_SECONDS:
            return
        self._watched_at = now
        error = load_state(self.run_dir, self._uri).error
        if error is not None and self._said is None:
            logger.warning("tracking: %s: %s; the journal keeps everything", redact(self._uri), error)
        elif error is None and self._said is not None:
            logger.warning("tracking: %s is back", redact(self._uri))
        self._said = error

    def _say_pending(self, uri: str, status: Status) -> None:
        state = load_state(self.run_dir, uri)
        left = pending(self.run_dir, state)
        if left == 0 and state.error is None and (state.status_sent == status or not self._owns_status):
            return
        reason = state.error or f"it took too long, see {self.run_dir / LOG_FILE}"
        logger.warning(
            "tracking: %d values or files have not reached %s (%s); the journal has them: `selora track sync %s`",
            left, redact(uri), reason, self.run_dir,
        )  # fmt: skip


def open_tracker(
    run_dir: Path,
    *,
    run_name: str,
    uri: str | None = None,
    experiment: str = "selora",
    enabled: bool = True,
    extra_tags: Mapping[str, object] | None = None,
    system_metrics: tuple[str, float] | None = None,
    owns_status: bool = True,
    below: Path | None = None,
) -> RunTracker:
    """Start or continue the tracking of the run in `run_dir`. One process per run; other ranks use a NullTracker.

    Args:
        run_name: the name shown in MLflow.
        uri: the store; None: MLFLOW_TRACKING_URI, else sqlite:///<run_dir/..>/mlflow.db.
        enabled: False: the journal only.
        system_metrics: (node, seconds): sample this machine at this interval.
        owns_status: False for a later stage (an evaluation) that adds to a run and must not change how it ended;
            if the run was moved with its SQLite store, it finds the store.
        below: a folder of run directories; one process ships them with this run.

    Raises:
        ConfigError: a malformed address, or a run directory that is read-only or in use.
    """
    run_dir = run_dir.absolute()
    uri = uri if owns_status else found_again(uri, run_dir)
    address = checked_uri(uri, run_dir.parent) if enabled else None
    if address is not None and importlib.util.find_spec("mlflow") is None:
        logger.warning("tracking: mlflow is not installed; %s has the journal only", run_dir)
        address = None
    journal = Journal(run_dir)
    try:
        ensure_identity(run_dir, run_name, experiment, None if address is None else redact(address), None)
    except OSError as error:
        journal.close()
        raise ConfigError(f"{run_dir}: cannot write the run directory: {error.strerror}") from None
    if owns_status:
        journal.write("status", status="RUNNING")
    tags = _texts(extra_tags or {})
    if tags:
        journal.write("tags", values=tags)
    address = None if address is None or SHIPPED_VARIABLE in os.environ else _to_ship_to(run_dir, address)
    shipper = _start_shipper(run_dir, address, system_metrics, below)
    return RunTracker(run_dir, journal, address, shipper, owns_status=owns_status)


def watch_machine(run_dir: Path, node: str, seconds: float) -> Shipper:
    """Sample the machine of another node into the run's directory; `finish(wait_s)` of the result ends it."""
    return Shipper(run_dir.absolute(), None, (node, seconds))


def _to_ship_to(run_dir: Path, address: str) -> str | None:
    try:
        return with_password(address)
    except PasswordMissing as error:
        logger.warning("tracking: %s; until `selora track sync %s` this run has its journal only", error, run_dir)
        return None


def _start_shipper(
    run_dir: Path, uri: str | None, system: tuple[str, float] | None, below: Path | None
) -> Shipper | None:
    if uri is None and system is None:
        return None
    try:
        return Shipper(run_dir, uri, system, below)
    except OSError as error:
        logger.warning("tracking: %s; this run has its journal only until `selora track sync %s`", error, run_dir)
        return None


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {str(key): redact(str(value)) for key, value in values.items()}
