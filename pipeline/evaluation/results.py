"""One result file per dataset, in CLIP_benchmark's shape, and when such a file still holds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
        result = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(result, dict) or "metrics" not in result:
        return None
    same = all(result.get(name) == value for name, value in asdict(identity).items())
    return result if same else None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write so that a reader, or a crash, sees the old file or the new one and never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.write(_pretty(content) + "\n")
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _pretty(content: dict[str, Any], margin: str = " ") -> str:
    """JSON with a line per key, and per key of its dicts of dicts: a confusion of 1000 classes is still one line."""
    lines = []
    for key, value in content.items():
        nested = isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values())
        text = _pretty(value, margin + " ") if nested else json.dumps(value, allow_nan=False, ensure_ascii=False)
        lines.append(f"{margin}{json.dumps(key, ensure_ascii=False)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{margin[1:]}}}"
