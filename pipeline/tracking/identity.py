"""The identity of a run in run_dir/run.json, written once and read by every later attempt, delivery and sync."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.files import read_json, replace_json

RUN_FILE = "run.json"
_SECTION = "tracking"  # other packages may keep their own keys in the same file


@dataclass(frozen=True)
class RunIdentity:
    """`run` is a uuid, which MLflow's copy has as the tag selora.run; `parent` is that of the parent run, if any."""

    run: str
    name: str
    experiment: str
    uri: str | None = None  # without a password; None: not for a store
    parent: str | None = None


def read_identity(run_dir: Path) -> RunIdentity | None:
    """The identity of the run in `run_dir`, None if it has none yet.

    Raises:
        ConfigError: run.json was not written by this package.
    """
    path = run_dir / RUN_FILE
    section = _read(path).get(_SECTION)
    if section is None:
        return None
    names = {one.name for one in fields(RunIdentity)}
    if not isinstance(section, dict) or set(section) != names or not isinstance(section["run"], str):
        raise ConfigError(f"{path}: its section {_SECTION!r} must hold {', '.join(sorted(names))}")
    return RunIdentity(**section)


def ensure_identity(run_dir: Path, name: str, experiment: str, uri: str | None, parent: str | None) -> RunIdentity:
    """Keep the run's uuid if it has one, otherwise draw one; the other fields are set to the given values."""
    known = read_identity(run_dir)
    run = known.run if known is not None else uuid.uuid4().hex
    if parent is None and known is not None:
        parent = known.parent
    identity = RunIdentity(run, name, experiment, uri, parent)
    if identity != known:
        path = run_dir / RUN_FILE
        replace_json(path, _read(path) | {_SECTION: asdict(identity)})
    return identity


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(str(error)) from None
