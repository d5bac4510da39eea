"""Decides whether two spellings name the same class, in any script."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from pipeline.config import ConfigError

_KEPT = "LMNS"  # letters with their marks, numbers and symbols; not punctuation, spaces and control characters


def plain_name(name: str) -> str:
    """A class name without differences of case, width, composed accents, spaces and punctuation.

    "aquarium_fish" and "Aquarium fish" are one class. A name that consists of punctuation is not changed.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(sign for sign in folded if unicodedata.category(sign)[0] in _KEPT) or folded


def by_plain_name(names: Iterable[str], where: str) -> dict[str, str]:
    """{plain name: name}.

    Args:
        names: class names; the same name may occur several times.

    Raises:
        ConfigError: two different names with one plain name; the message gives both.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(plain_name(name), name)
        if other != name:
            raise ConfigError(
                f"{where}: the class names {other!r} and {name!r} differ only in case, spaces or punctuation, so they "
                "would count as one class; rename one of them"
            )
    return found
