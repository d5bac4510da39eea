"""A narrow MLflow client: the requests of a delivery, and three kinds of failure instead of MLflow's dozens.

On the tracking path only this module imports mlflow, and only inside functions, because the import takes seconds.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pipeline.config import ConfigError
from pipeline.passwords import redact
from pipeline.tracking.locks import Busy, ProcessLock
from pipeline.tracking.mlflow.moved import relocate
from pipeline.tracking.mlflow.uris import artifact_root, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_TAG = "selora.run"
PARENT_TAG = "mlflow.parentRunId"
MAX_METRICS, MAX_PAIRS = 1000, 100  # per log_batch call
_MAX_NAME, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000
_CREATE_WAIT_SECONDS = 120.0  # a new SQLite store first runs all of MLflow's migrations
# An error of the database is raised as well, so its traceback in the log says nothing more.
LOG_LEVELS = {"mlflow": logging.ERROR, "alembic": logging.ERROR, "mlflow.store.db.utils": logging.CRITICAL}
_REPLACE = "move it away and fill a new one by `selora track sync RUN --full`"
# Text in the first line of an error, and the message for it.
_SIGNS = {
    **{sign: sign for sign in ("Connection refused", "timed out", "Name or service not known", "Connection reset")},
    "database is locked": "another program keeps the database locked: end it, or wait until it is done",
    "file is not a database": f"it is not a SQLite database: name another file, or {_REPLACE}",
    "database disk image is malformed": f"its file is damaged: restore a backup, or {_REPLACE}",
    "unable to open database file": "its file cannot be opened: it is a directory, or not yours to read and write",
    "readonly database": "its file cannot be written by this user",
    "out-of-date database schema": "its tables are of another MLflow: back it up, then run `mlflow db upgrade '{uri}'`",
    "Can't locate revision": "the tables of {uri} are of a newer MLflow than the one installed here: upgrade mlflow",
}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")

# MLflow's defaults block a call for minutes if the server is away; deliveries have their own retries.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

Metric = tuple[str, float, int, int]  # name, value, time in ms, step


class Away(Exception):
    """The store is not available now; the same call may work later."""


class Refused(Exception):
    """The store is available but will never accept this content."""


class Gone(Exception):
    """The run is not in the store."""


@contextmanager
def client_environment(settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Set MLflow's client settings for a block, unless the user has set them; `settings` override our defaults."""
    wanted = {**CLIENT_ENVIRONMENT, **settings}
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


class MlflowStore:
    """One experiment of one tracking store; methods raise only Away, Refused or Gone.

    A new experiment of a bare database keeps its files below `out`.
    """

    def __init__(self, uri: str, experiment: str, out: Path = Path("runs")) -> None:
        self.uri = uri
        self.experiment = experiment
        self._out = out
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._file: tuple[int, int] | None = None

    def experiment_id(self, run_id: str | None) -> str:
        """The experiment of a run; without a run, that of this store, created if it is missing."""
        if run_id is not None:
            return self.get_run(run_id).info.experiment_id
        with self.calling():
            return self._experiment_id

    def find_runs(self, run: str) -> list[Run]:
        """The MLflow runs with this run's uuid, including deleted ones, in a fixed order."""
        with self.calling() as client:
            from mlflow.entities import ViewType

            found = client.search_runs(
                [self._experiment_id], f"tags.`{RUN_TAG}` = '{run}'", run_view_type=ViewType.ALL, max_results=100
            )
            return sorted(found, key=lambda one: (one.info.lifecycle_stage != "active", one.info.run_id))

    def get_run(self, run_id: str) -> Run:
        with self.calling() as client:
            return client.get_run(run_id)

    def create_run(self, run: str, name: str, start_ms: int) -> str:
        with self.calling() as client:
            made = client.create_run(self._experiment_id, start_time=start_ms, tags={RUN_TAG: run}, run_name=name)
            return made.info.run_id

    def delete_run(self, run_id: str) -> None:
        with self.calling() as client:
            client.delete_run(run_id)

    def log_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        with self.calling() as client:
            from mlflow.entities import Metric as Entity

            entities = [Entity(legal_name(name), value, time_ms, step) for name, value, time_ms, step in metrics]
            client.log_batch(run_id, metrics=entities, synchronous=True)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log params with legal names that do not contradict those of the run."""
        with self.calling() as client:
            from mlflow.entities import Param

            client.log_batch(run_id, params=[Param(*pair) for pair in params.items()], synchronous=True)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        with self.calling() as client:
            from mlflow.entities import RunTag

            entities = [RunTag(legal_name(name), _cut(value, _MAX_TAG)) for name, value in tags.items()]
            client.log_batch(run_id, tags=entities, synchronous=True)

    def upload(self, run_id: str, path: Path, folder: str) -> None:
        with self.calling() as client:
            client.log_artifact(run_id, str(path), folder or None)

    def set_status(self, run_id: str, status: str, end_ms: int) -> None:
        with self.calling() as client:
            if status in ("SCHEDULED", "RUNNING"):
                client.update_run(run_id, status=status)
            else:
                client.set_terminated(run_id, status, end_ms)

    @contextmanager
    def calling(self) -> Iterator[MlflowClient]:
        """The connected client; every exception in the block becomes Away, Refused, Gone or ConfigError."""
        with _translated(self.uri):
            client = self._client or self._open()
            if self._file != _file_of(self.uri):
                raise Away(
                    "its file was removed or replaced while it was open; `selora track sync RUN` fills the new one"
                )
            yield client

    def _open(self) -> MlflowClient:
        """Connect, and create store and experiment if they are missing; for SQLite one process at a time."""
        from mlflow import MlflowClient

        for name, level in LOG_LEVELS.items():
            logging.getLogger(name).setLevel(level)
        file = sqlite_path(self.uri)
        if file is None:
            client = MlflowClient(self.uri, registry_uri=self.uri)
            self._experiment_id = self._find_or_create_experiment(client)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            with ProcessLock(file.with_name(file.name + ".lock"), _CREATE_WAIT_SECONDS):
                relocate(self.uri)
                client = MlflowClient(self.uri, registry_uri=self.uri)
                self._experiment_id = self._find_or_create_experiment(client)
        self._client, self._file = client, _file_of(self.uri)
        return client

    def _find_or_create_experiment(self, client: MlflowClient) -> str:
        from mlflow import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return client.create_experiment(self.experiment, artifact_location=artifact_root(self.uri, self._out))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(self.experiment)
        if found is None or found.lifecycle_stage != "active":
            raise Away(
                f"the experiment {self.experiment!r} is deleted there; restore it or choose another tracking.experiment"
            )
        return found.experiment_id


@contextmanager
def as_config_errors(uri: str, what: str = "", advice: str = "") -> Iterator[None]:
    """Raise errors of MLflow and of its drivers as ConfigErrors: a wrong address, a store that is away or damaged.

    Args:
        uri: the store's address.
        what: start of the message.
        advice: its end if the store lacks what was looked for.

    Raises:
        ConfigError: instead of these errors.
    """
    from mlflow import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        lacks = getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
        raise ConfigError(f"{what}{redact(uri)}: {reason_of(error, uri)}{advice if lacks else ''}") from error


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        from mlflow import MlflowException
    except ImportError as error:
        raise Away(f"mlflow cannot be imported: {error}") from error
    try:
        yield
    except (Away, Refused, Gone, ConfigError):
        raise
    except Busy as busy:
        raise Away(f"{busy} is creating the store") from None
    except MlflowException as error:
        reason = reason_of(error, uri)
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise Gone(reason) from error
        if error.error_code in _REFUSALS:
            raise Refused(reason) from error
        raise Away(reason) from error
    except Exception as error:  # drivers and HTTP libraries raise their own errors; none may reach a training
        raise Away(reason_of(error, uri)) from error


def reason_of(error: Exception, uri: str) -> str:
    """MLflow's error, or that of a driver below it, in one line.

    Args:
        error: the error as raised.

    Returns:
        At most 300 characters, without a password.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = redact(lines[0].replace(uri, redact(uri)))
    for sign, reason in _SIGNS.items():
        if sign in text:
            return reason.format(uri=redact(uri))
    return text if len(text) <= 300 else text[:300] + "…"


def _file_of(uri: str) -> tuple[int, int] | None:
    """Device and number of a SQLite store's file, which the name may lose to another; None for any other store."""
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino


def legal_name(name: str) -> str:
    """MLflow's name of a metric, param or tag: r@1 becomes r_at_1, other characters become _ with a digest.

    A pure function, so that every delivery of a value uses the same name; the digest distinguishes names.
    """
    legal = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name.replace("@", "_at_"))
    legal = re.sub(r"/{2,}", "/", legal).strip("/")
    parts = [part.replace(".", "_") if part in (".", "..") else part for part in legal.split("/")]
    legal = "/".join(parts) or "_"
    if legal == name.replace("@", "_at_") and len(legal) <= _MAX_NAME:
        return legal
    return f"{legal[: _MAX_NAME - 9]}.{sha256(name.encode()).hexdigest()[:8]}"


def legal_param(name: str, value: str) -> tuple[str, str]:
    """Name and value of a param in MLflow's form."""
    return legal_name(name), _cut(value, _MAX_PARAM)


def _cut(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"
