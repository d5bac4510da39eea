"""One result file per dataset, in CLIP_benchmark's shape, and when such a file still holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json

Result = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """What a result depends on. A file with the same identity is not computed again."""

    model_digest: str
    dataset_digest: str
    precision: str
    preprocessing: str
    limit: int | None


def finished_result(file: Path, identity: Identity) -> Result | None:
    """The result in `file` if it is one of this identity; anything else there is out of date or torn."""
    try:
        result = read_json(file)
    except (FileNotFoundError, ValueError):
        return None
    if "metrics" not in result:
        return None
    same = all(result.get(name) == value for name, value in asdict(identity).items())
    return result if same else None
