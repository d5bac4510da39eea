"""Class names and captions: the readable name of a class folder, and the sentences about it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.config.templates import PLACEHOLDER, TEMPLATES, fault_of_templates
from pipeline.config.text_file import lines_of, read_json, read_text

_DIGITS = re.compile(r"([0-9]+)")
_SEPARATOR = re.compile(r"\s*[,:;=]\s*|\s+")


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The sentences behind a name of ``TEMPLATES``, or the checked sentences themselves.

    Raises:
        ConfigError: For an unknown name, an empty list or a sentence without ``{c}``.
    """
    fault = fault_of_templates(templates)
    if fault is not None:
        raise ConfigError(f"templates: {fault}")
    return TEMPLATES[templates] if isinstance(templates, str) else tuple(templates)


def caption(template: str, classname: str) -> str:
    """The template's sentence about one class. ``{c}`` is replaced as text: other braces stay as they are."""
    return template.replace(PLACEHOLDER, classname)


def readable_name(folder: str) -> str:
    """The name of a class folder in captions: ``ankle_boot`` -> ``ankle boot``; a hyphen is part of the word."""
    return " ".join(unicodedata.normalize("NFC", folder).replace("_", " ").split())


def natural_key(folder: str) -> tuple[tuple[int, str, str], ...]:
    """Sorts ``class2`` before ``class10``, and numbers by their value."""
    parts = [(part.lstrip("0"), part) for part in _DIGITS.split(folder)]
    # Text and digits alternate. Of two numbers the one with more digits is larger, however long they are.
    return tuple((len(short) if i % 2 else 0, short if i % 2 else part, part) for i, (short, part) in enumerate(parts))


def read_classnames(path: str | Path, folders: Sequence[str], encoding: str | None = None) -> list[str]:
    """Readable names of ``folders`` from a text or json file.

    A line is ``folder<TAB>name`` (in any order, every folder named), or begins with a folder's name as in
    ``n01440764 tench, Tinca tinca``; or it is just ``name``, in the order of ``folders``. A json file holds
    ``{folder: name}`` or a list of names. Blank lines do not count.

    Args:
        path: The file.
        folders: Names of the class folders, or labels of a table, in the order of their labels.
        encoding: Encoding of a file that is not UTF-8.

    Returns:
        A name for each folder, in the order of ``folders``.

    Raises:
        ConfigError: When a folder has no name, or names cannot be matched with folders.
    """
    if Path(path).suffix.lower() == ".json":
        lines, names = _names_in_json(path, encoding)
    else:
        lines = [line.strip() for line in lines_of(read_text(path, encoding, option=True)) if line.strip()]
        names = _names_by_folder(path, lines, folders)
    if names is not None:
        return _names_of(path, names, folders)
    if len(lines) != len(folders):
        raise ConfigError(
            f"{path}: {len(lines)} class names for {len(folders)} classes ({_few(folders)}); a line each in this "
            f"order, or 'folder<TAB>name'"
        )
    if not all(_is_number(folder) for folder in folders) and list(folders) != sorted(folders):
        swapped = next(folder for folder, other in zip(folders, sorted(folders), strict=True) if folder != other)
        raise ConfigError(
            f"{path}: names without keys, for folders that count differently by number ({_few(folders)}) and by "
            f"letter ({_few(sorted(folders))}), from {swapped} on; write 'folder<TAB>name' lines, as in "
            f"'{folders[0]}<TAB>{lines[0]}'"
        )
    return lines


def _names_in_json(path: str | Path, encoding: str | None) -> tuple[list[str], dict[str, str] | None]:
    """The names of a list, or an object's name by folder; the last of several names (["n01440764", "tench"])."""
    found = read_json(path, encoding, option=True)
    listed = found if isinstance(found, list) else list(found.values()) if isinstance(found, dict) else [None]
    listed = [name[-1] if isinstance(name, list) and name else name for name in listed]
    wrong = next((name for name in listed if not isinstance(name, str) or not name.strip()), None)
    if wrong is not None or not listed:
        raise ConfigError(f"{path}: should be a json object {{folder: name}} or a list of names, got {str(wrong)[:60]}")
    lines = [" ".join(str(name).split()) for name in listed]
    if isinstance(found, list):
        return lines, None
    names = dict(zip(map(_nfc, found), lines, strict=True))
    # Keras ships {"0": ["n01440764", "tench"], …}, with label and folder.
    names |= {_nfc(name[0]): name[-1] for name in found.values() if isinstance(name, list)}
    return lines, names


def _names_by_folder(path: str | Path, lines: Sequence[str], folders: Sequence[str]) -> dict[str, str] | None:
    """Name by folder if lines have keys; None if they are just names."""
    names: dict[str, str] = {}
    if any("\t" in line for line in lines):
        for line in lines:
            folder, tab, name = line.partition("\t")
            if not tab or not name.strip():
                raise ConfigError(f"{path}: line {line!r} is not 'folder<TAB>name' as the other lines are")
            _add(path, names, _nfc(folder.strip()), name)
        return names
    known = {_nfc(folder) for folder in folders}
    for line in map(_nfc, lines):
        # The longest folder that the line begins with, before a space, comma, colon, semicolon or equals sign.
        cuts = [cut for cut in _SEPARATOR.finditer(line) if line[: cut.start()] in known and line[cut.end() :]]
        if cuts:
            _add(path, names, line[: cuts[-1].start()], line[cuts[-1].end() :])
    # There may be more lines than folders, as ImageNet's thousand for a hundred of them.
    return names if len(names) * 2 > len(known) else None


def _add(path: str | Path, names: dict[str, str], folder: str, name: str) -> None:
    if names.setdefault(folder, name.strip()) != name.strip():
        raise ConfigError(f"{path}: two names for {folder!r}: {names[folder]!r} and {name.strip()!r}")


def _names_of(path: str | Path, names: dict[str, str], folders: Sequence[str]) -> list[str]:
    missing = [folder for folder in folders if _nfc(folder) not in names]
    if missing:
        raise ConfigError(f"{path}: no name for {len(missing)} of {len(folders)} classes: {_few(missing)}")
    return [names[_nfc(folder)] for folder in folders]


def _nfc(text: str) -> str:
    """macOS writes é as two characters, most other systems as one."""
    return unicodedata.normalize("NFC", str(text))


def _is_number(folder: str) -> bool:
    return bool(re.fullmatch(r"[0-9]+", folder))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
