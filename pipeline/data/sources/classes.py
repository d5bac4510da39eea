"""Class folders and labels -> class names for captions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from pipeline.config import ConfigError
from pipeline.data.sources.sample import SourceOptions
from pipeline.prompts import read_classnames, readable_name

_WNID = re.compile(r"n\d{8}")


def class_names(folders: Sequence[str], options: SourceOptions) -> list[str]:
    """Readable names of class folders or labels, from a file or derived from the folders.

    Args:
        folders: Names of folders, or labels of a table, in the order of the classes.
        options: The user's options, with the file.

    Returns:
        A name for each folder.

    Raises:
        ConfigError: When two classes have the same name, or a name is missing.
    """
    if options.classnames:
        names = read_classnames(options.classnames, folders, options.encoding)
    else:
        names = [readable_name(folder) for folder in folders]
    for name, count in Counter(names).items():
        if count > 1:
            same = [_shown(folder) for folder, each in zip(folders, names, strict=True) if each == name]
            raise ConfigError(
                f"classes: {count} classes read {name!r} ({', '.join(same[:5])}); rename or merge them, or give "
                "--classnames FILE with different names"
            )
    return names


def _shown(folder: str) -> str:
    """The name in quotes, escaped if it may look like another one: é can be one character or two."""
    return repr(folder) if unicodedata.is_normalized("NFC", folder) else ascii(folder)


def class_notes(names: Sequence[str]) -> list[str]:
    """Notes for the user about the class names, a sentence each."""
    notes = []
    wnids = [name for name in names if _WNID.fullmatch(name)]
    numbers = [name for name in names if name.isdecimal()]
    for what, found in (("WordNet ids", wnids), ("numbers", numbers)):
        if len(found) * 2 > len(names):
            notes.append(
                f"the classes are named by {what}, so captions will say 'a photo of a {found[0]}.'; --classnames FILE "
                f"gives names, one per line as in '{found[0]}<TAB>tench'"
            )
    if len(names) == 1:
        notes.append(f"there is only one class, {names[0]!r}, so there is nothing to distinguish it from")
    return notes


def shown_mapping(folders: Sequence[str], names: Sequence[str], most: int = 20) -> list[str]:
    """Lines of "label: folder → name", the first ``most`` classes."""
    lines = [f"{label}: {folder} → {name}" for label, (folder, name) in enumerate(zip(folders, names, strict=False))]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])
