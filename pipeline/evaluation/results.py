"""One result file per dataset, in CLIP_benchmark's format, and the check that a file is still valid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json

Result = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """Everything that a result depends on. A result with the same identity is not computed again."""

    model_digest: str
    dataset_digest: str
    precision: str
    preprocessing: str
    limit: int | None


def finished_result(file: Path, identity: Identity) -> Result | None:
    """The result in `file` if it has this identity; None if the file is outdated or damaged."""
    try:
        result = read_json(file)
    except (FileNotFoundError, ValueError):
        return None
    if "metrics" not in result:
        return None
    same = all(result.get(name) == value for name, value in asdict(identity).items())
    return result if same else None
