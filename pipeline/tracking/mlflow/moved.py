"""Directories of runs that were moved with their SQLite store, although MLflow and the runs store absolute paths."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.tracking.mlflow.uris import artifact_root, sqlite_path, sqlite_uri

_LOCKED_SECONDS = 30.0
# Columns in which MLflow stores the address of a file or directory.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def found_again(uri: str | None, run_dir: Path) -> str | None:
    """The address that a run was started with, or that of the same file in a directory above the run.

    Args:
        uri: address from run.json.
        run_dir: directory of the run.

    Returns:
        `uri`, unless its SQLite file is missing and a directory above the run has a file of this name.
    """
    file = None if uri is None else sqlite_path(uri)
    if file is None or file.exists():
        return uri
    near = (parent / file.name for parent in run_dir.absolute().parents)
    return next((sqlite_uri(path) for path in near if path.is_file()), uri)


def relocate(uri: str) -> None:
    """Update the addresses in a SQLite store that was moved with its `mlartifacts`, if the old ones no longer exist.

    A copy of a store whose original still exists is not changed. MLflow opens the store after this, and would retry for
    minutes if it cannot.

    Raises:
        sqlite3.Error: the file is not a database, is damaged or locked, or cannot be opened.
    """
    file, new = sqlite_path(uri), artifact_root(uri, Path())
    if file is None or new is None or not file.exists():
        return
    with closing(sqlite3.connect(file, timeout=_LOCKED_SECONDS)) as connection, connection:
        try:
            found = connection.execute("select distinct artifact_location from experiments").fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # a new store
                return
            raise
        for (old,) in found if _path(new).is_dir() else ():
            if old and old != new and _path(old).name == _path(new).name and not _path(old).exists():
                for table, column in _COLUMNS:
                    connection.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) "
                        f"where {column} = ? or substr({column}, 1, ?) = ?",
                        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )


def _path(address: str) -> Path:
    return Path(unquote(urlsplit(address).path) if address.startswith("file:") else address)
