"""Tracking addresses: which are accepted, where the default lies, and how they are shown without passwords."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config import ConfigError

_SERVERS = ("http", "https", "databricks")
# The drivers that MLflow is run with; an address without one gets the first that is installed, not SQLAlchemy's choice.
_DRIVERS = {"postgresql": ("psycopg2", "psycopg"), "mysql": ("pymysql",), "mssql": ("pyodbc",)}
_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):([^/@\s]*)@")


def resolve_uri(uri: str | None, out: Path) -> str:
    """The address to use: the given one, else MLFLOW_TRACKING_URI, else sqlite:///OUT/mlflow.db.

    A server that does not answer is no error here; an address that cannot be right is.

    Raises:
        ConfigError: the address is malformed, or names a file store, which MLflow has given up.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.absolute() / 'mlflow.db'}"
    scheme, separator, rest = uri.partition("://")
    dialect, _, driver = scheme.partition("+")
    if uri == "databricks" or (separator and dialect == "databricks"):
        return uri
    if not separator or dialect == "file":
        raise ConfigError(
            f"tracking.uri={redact(uri)!r}: MLflow no longer keeps runs in plain directories; "
            f"use sqlite:///{out.absolute() / 'mlflow.db'}, postgresql://… or http(s)://…"
        )
    if dialect == "sqlite":
        return _absolute_sqlite(uri, rest)
    if dialect in _SERVERS:
        return _checked_server(uri)
    if dialect in _DRIVERS:
        return _with_driver(uri, dialect, (driver,) if driver else _DRIVERS[dialect])
    raise ConfigError(
        f"tracking.uri={redact(uri)!r}: unknown scheme {scheme!r}; known: http, https, sqlite, {', '.join(_DRIVERS)}"
    )


def redact(text: str) -> str:
    """`text` with the password of every address in it replaced by ***."""
    return _PASSWORD.sub(r"\1:***@", text)


def sqlite_path(uri: str) -> Path | None:
    """The file of a resolved sqlite address, None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifact_root(uri: str, out: Path) -> str | None:
    """Where a new experiment keeps its files: beside the SQLite file, else in `out`; None leaves it to the server."""
    if uri.partition("+")[0] in _DRIVERS:
        return str(out.absolute() / "mlartifacts")
    path = sqlite_path(uri)
    return None if path is None else str(path.parent / "mlartifacts")


def _absolute_sqlite(uri: str, rest: str) -> str:
    file = rest.removeprefix("/").partition("?")[0]
    if not rest.startswith("/") or not file or file == ":memory:":
        raise ConfigError(f"tracking.uri={uri!r}: name a file, as in sqlite:///runs/mlflow.db")
    path = Path(file).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"tracking.uri={uri!r}: cannot make {path.parent}: {error.strerror}") from None
    return f"sqlite:///{path}"


def _checked_server(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"tracking.uri={redact(uri)!r}: {error}") from None
    if not host or any(character.isspace() for character in uri):
        raise ConfigError(f"tracking.uri={redact(uri)!r}: names no host; write it as http://host:port")
    return uri.rstrip("/")


def _with_driver(uri: str, dialect: str, drivers: Sequence[str]) -> str:
    found = next((one for one in drivers if importlib.util.find_spec(one) is not None), None)
    if found is None:
        raise ConfigError(
            f"tracking.uri={redact(uri)!r}: needs the Python package {drivers[0]}, which is not installed"
        )
    return f"{dialect}+{found}://{uri.partition('://')[2]}"
