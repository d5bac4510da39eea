"""Atomic writes: a file is replaced in one step, after its content has reached the disk."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; after the block the file replaces `path`.

    A reader sees, and a crash leaves, either the old file or the new one, never a part. After an error in the block the
    old file stays and the new one is removed.

    Args:
        path: the file to be written; its directory is created.
        temporary: a name in the same directory (None: one that no other writer uses).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in one step, a line for each key; `nan` and `inf` raise a ValueError."""
    replace_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """JSON with a line for each key, also inside dicts of dicts: a confusion matrix of 1000 classes is one line."""
    return _lines(content, " ") + "\n"


def _lines(content: Mapping[str, Any], margin: str) -> str:
    lines = []
    for key, value in content.items():
        nested = isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values())
        text = _lines(value, margin + " ") if nested else json.dumps(value, allow_nan=False, ensure_ascii=False)
        lines.append(f"{margin}{json.dumps(key, ensure_ascii=False)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{margin[1:]}}}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if there is none.
        ValueError: it holds something else; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
