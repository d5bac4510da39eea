"""Tracking addresses: the accepted ones, the default, and the source of a password that was left out.

No file holds a password: config.yaml, run.json and MLflow's copy have *** in its place.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pipeline.config import ConfigError
from pipeline.passwords import MASK, redact

_QUOTED = re.compile(r"[?%]")
_SERVERS = ("http", "https", "databricks")
_PASSWORD_VARIABLES = dict.fromkeys(("http", "https"), "MLFLOW_TRACKING_PASSWORD") | {"postgresql": "PGPASSWORD"}
# MLflow's drivers; an address without one gets the first that is installed, not SQLAlchemy's default.
_DRIVERS = {"postgresql": ("psycopg2", "psycopg"), "mysql": ("pymysql",), "mssql": ("pyodbc",)}


class PasswordMissing(ConfigError):
    """The password of an address was left out when it was stored, and nothing provides it again."""


def resolve_uri(uri: str | None, out: Path) -> str:
    """The address to use (see `checked_uri`), with its password in place of ***.

    Raises:
        ConfigError: see `checked_uri`; PasswordMissing if nothing provides the password.
    """
    return with_password(checked_uri(uri, out))


def with_password(uri: str) -> str:
    """`uri` with its *** replaced: by MLFLOW_TRACKING_URI if that is the same address, else by the client's own means.

    Those are MLFLOW_TRACKING_PASSWORD for a server, and for PostgreSQL PGPASSWORD or ~/.pgpass, which libpq reads.
    """
    if MASK not in uri:
        return uri
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given and MASK not in given and redact(whole := checked_uri(given, Path())) == uri:
        return whole
    variable = _PASSWORD_VARIABLES.get(re.split(r"[+:]", uri)[0])
    if variable is not None and os.environ.get(variable):
        return uri.replace(MASK, quote(os.environ[variable], safe=""))
    if variable == "PGPASSWORD" and _has_pgpass():
        return uri.replace(f":{MASK}@", "@")
    own = "" if variable is None else f", or the password alone by {variable}"
    own += " or ~/.pgpass" if variable == "PGPASSWORD" else ""
    raise PasswordMissing(
        f"the password of {uri} is not stored; give the whole address by MLFLOW_TRACKING_URI, tracking.uri or "
        f"--uri{own}"
    )


def _has_pgpass() -> bool:
    with suppress(RuntimeError):  # a process without a home directory
        return Path(os.environ.get("PGPASSFILE", "~/.pgpass")).expanduser().is_file()
    return False


def without_user(uri: str) -> str:
    """A server's address without user and password, for a request that needs neither."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def checked_uri(uri: str | None, out: Path) -> str:
    """The given address, else MLFLOW_TRACKING_URI, else sqlite:///OUT/mlflow.db; *** may replace its password.

    A server that does not answer is not an error here; an invalid address is.

    Raises:
        ConfigError: the address is malformed, or names a file store, which MLflow no longer supports.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(out / "mlflow.db")
    scheme, separator, rest = uri.partition("://")
    dialect, _, driver = scheme.partition("+")
    if uri == "databricks" or (separator and dialect == "databricks"):
        return uri
    if not separator or dialect == "file":
        raise ConfigError(
            f"tracking.uri={redact(uri)!r}: MLflow no longer keeps runs in plain directories; "
            f"use {sqlite_uri(out / 'mlflow.db')}, postgresql://… or http(s)://…"
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


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite file, with ? and % quoted, which have a meaning in addresses."""
    plain = str(path.absolute())
    quoted = _QUOTED.sub(lambda sign: quote(sign[0]), plain)
    # With a driver in the address, MLflow does not create a directory with the quoted name.
    return f"sqlite:///{plain}" if quoted == plain else f"sqlite+pysqlite:///{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """The file of a resolved SQLite address; None for any other."""
    found = re.match(r"sqlite(?:\+pysqlite)?:///", uri)
    return None if found is None else Path(unquote(uri[found.end() :]))


def artifact_root(uri: str, out: Path) -> str | None:
    """Place of a new experiment's files: next to the SQLite file, else in `out`; None leaves it to the server."""
    path = sqlite_path(uri)
    if path is None and uri.partition("+")[0] not in _DRIVERS:
        return None
    root = (out.absolute() if path is None else path.parent) / "mlartifacts"
    # MLflow also decodes %.. in a plain path; without any, a plain path is easier to read.
    return root.as_uri() if re.search(r"[?%#]", str(root)) else str(root)


def _absolute_sqlite(uri: str, rest: str) -> str:
    file = unquote(rest.removeprefix("/").partition("?")[0])
    if not rest.startswith("/") or not file or file == ":memory:":
        raise ConfigError(f"tracking.uri={uri!r}: name a file, as in sqlite:///runs/mlflow.db")
    path = Path(file).absolute()
    if path.is_dir():
        raise ConfigError(
            f"tracking.uri={uri!r}: is a directory; name a file in it, as in {sqlite_uri(path / 'mlflow.db')}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"tracking.uri={uri!r}: cannot make {path.parent}: {error.strerror}") from None
    return sqlite_uri(path)


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
