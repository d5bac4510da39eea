"""A directory of runs that was moved with its SQLite store: MLflow and the runs keep absolute addresses of files."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.tracking.mlflow.uris import artifact_root, sqlite_path, sqlite_uri

_LOCKED_SECONDS = 30.0
# Where MLflow keeps the address of a file or of a directory of files.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def found_again(uri: str | None, run_dir: Path) -> str | None:
    """The address that a run was started with, or that of the same file further up from where the run is now.

    Args:
        uri: as run.json has it.
        run_dir: directory of the run.

    Returns:
        `uri`, unless it is of a SQLite file that is gone and one of its name is in a directory above the run.
    """
    file = None if uri is None else sqlite_path(uri)
    if file is None or file.exists():
        return uri
    near = (parent / file.name for parent in run_dir.absolute().parents)
    return next((sqlite_uri(path) for path in near if path.is_file()), uri)


def relocate(uri: str) -> None:
    """Let a SQLite store that was moved with its `mlartifacts` find them: its addresses follow where the old are gone.

    A copy of a store whose original is still there is left as it is. MLflow opens the store after this, and would try
    for minutes where it cannot.

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
