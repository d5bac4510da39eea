"""Reference texts: a list that ships with the package, or a user's file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.config.text_file import decode_text, lines_of, read_text

# Names of the shipped lists; each is a file NAME.txt in this folder.
SHIPPED = ("general",)


def reference_texts(name_or_path: str) -> list[str]:
    """The sentences of a shipped list or of a text file, each once, in the order of the file.

    Args:
        name_or_path: `general`, or the path of a UTF-8 file with one sentence per line; empty lines are ignored.

    Raises:
        ConfigError: for a file that does not exist, is not UTF-8, or holds fewer than two sentences.
    """
    if name_or_path in SHIPPED:
        data = resources.files("pipeline.data.reference").joinpath(f"{name_or_path}.txt").read_bytes()
        text = decode_text(data, name_or_path)
    else:
        try:
            text = read_text(Path(name_or_path).expanduser())
        except ConfigError as error:
            raise ConfigError(f"keep.texts: {error}, or use keep.texts={SHIPPED[0]}") from None
    sentences = list(dict.fromkeys(line.strip() for line in lines_of(text) if line.strip()))
    if len(sentences) < 2:
        found = "one sentence" if sentences else "no sentence"
        raise ConfigError(
            f"keep.texts={name_or_path}: holds {found}, but at least two are needed; write one per line, or use "
            f"keep.texts={SHIPPED[0]}"
        )
    return sentences
