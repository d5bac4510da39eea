"""Reference texts: a list that ships with the package, or a file of the user's."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from pipeline.config import ConfigError

# Names of the lists that ship with the package, each a file NAME.txt in this folder.
SHIPPED = ("general",)


def reference_texts(name_or_path: str) -> list[str]:
    """The sentences of a shipped list or of a text file, each once, in the order of the file.

    Args:
        name_or_path: `general`, or the path of a UTF-8 file with a sentence a line; empty lines are left out.

    Raises:
        ConfigError: for a file that does not exist, is not UTF-8, or holds no sentence.
    """
    if name_or_path in SHIPPED:
        data = resources.files("pipeline.data.reference").joinpath(f"{name_or_path}.txt").read_bytes()
    else:
        data = _read(Path(name_or_path).expanduser(), name_or_path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"keep.texts={name_or_path}: line {line} is not UTF-8; save the file as UTF-8") from error
    sentences = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not sentences:
        raise ConfigError(f"keep.texts={name_or_path}: holds no sentence; write one a line, or use keep.texts=general")
    return sentences


def _read(path: Path, said: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"keep.texts={said}: {error.strerror}; give a text file with a sentence a line, or "
            f"{' or '.join(SHIPPED)} for a list that ships with selora"
        ) from error
