"""The files of an evaluation: one for each dataset, their summary, and comparisons of strengths and checkpoints.

<folder>/<dataset>.json     one result, in CLIP_benchmark's shape
<folder>/summary.json       all of them by group, against the untouched model
<folder>/strength.json      the curve between the untouched and the trained model
<folder>/checkpoints.json   all kept checkpoints by the mean of id
<folder>/floors.json        results at the strengths that keep 99, 95, 90 %, and at the floor of its sweep
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.runs.formats import Format

EVAL, SUMMARY_FILE, STRENGTH_FILE, CHECKPOINTS_FILE = "eval", "summary.json", "strength.json", "checkpoints.json"
FLOORS_FILE = "floors.json"
SUMMARY = Format("selora-summary", 1, ("datasets", "groups"))
FLOORS = Format("selora-floors", 1, ("floor", "floors"))


def has_summary(folder: Path) -> bool:
    """Whether an evaluation into this folder is complete."""
    return (folder / SUMMARY_FILE).is_file()


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary of an evaluation."""
    SUMMARY.write(folder / SUMMARY_FILE, summary)


def read_summary(path: str | Path) -> dict[str, Any]:
    """A summary.json, or the one in a folder.

    Raises:
        ConfigError: there is none, or it is damaged, of another kind or of a later version.
    """
    path = Path(path)
    file = path / SUMMARY_FILE if path.is_dir() else path
    try:
        return SUMMARY.read(file)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such summary; `selora evaluate` writes it") from None


def write_floors(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the results of a model at each floor."""
    FLOORS.write(folder / FLOORS_FILE, content)


def read_floors(folder: Path) -> dict[str, Any] | None:
    """The content of floors.json in a folder; None if there is none.

    Raises:
        ConfigError: it is damaged, of another kind or of a later version.
    """
    try:
        return FLOORS.read(folder / FLOORS_FILE)
    except FileNotFoundError:
        return None


def reported_at(alpha: float) -> Path:
    """Folder within a run of the results at a strength, measured on images that were not used to choose a strength."""
    return Path(EVAL, "strength", "auto", "reporting", f"{alpha:g}")
