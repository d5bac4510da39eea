"""Messages about mistakes in a config: the option, the expected value, the value given and where it was written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.passwords import redact

# Error type of pydantic -> message that replaces its own, which is about Python's types and patterns.
_WORDS = {
    "missing": "is missing",
    "tuple_type": "should be a list{of}, as in {key}=[{example}]",
    "too_short": "should not be empty",
    "too_long": "should have {max_length} entries",
    "string_too_short": "should not be empty",
    # `name` has the only pattern.
    "string_pattern_mismatch": "should begin with a letter, digit or _ and have only a-z, A-Z, 0-9 and . _ + = , @ -",
}


class ConfigError(Exception):
    """A mistake of the user, described in the user's terms; the command line prints it and exits with 2.

    Its message is printed, logged and kept with the run, so passwords are removed from the addresses in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class Ended(Exception):
    """The end of a command for a reason that is not the user's mistake; the command line prints it and exits with 1."""


class Raw(NamedTuple):
    """One value before any check, and the place where it was written ("file:line" or "command line")."""

    value: Any
    origin: str


def faults_of(error: ValidationError, known: Mapping[str, FieldInfo], raw: Mapping[str, Raw]) -> list[tuple[str, str]]:
    """(dotted key, or "" for a rule between options; message) of every fault that pydantic found.

    known: {dotted key: field} of every option; raw: the values as they were written.
    """
    return [_fault(detail, known, raw) for detail in error.errors(include_url=False) if not _other_branch(detail)]


def _fault(detail: ErrorDetails, known: Mapping[str, FieldInfo], raw: Mapping[str, Raw]) -> tuple[str, str]:
    """(dotted key or "", message) of one fault that pydantic found."""
    parts = [str(part) for part in detail["loc"]]
    if not parts:
        return "", str(detail["msg"]).removeprefix("Value error, ")
    depth = next((size for size in (2, 1) if ".".join(parts[:size]) in known), len(parts))
    key = ".".join(parts[:depth])
    if detail["type"] == "missing" and len(parts) == depth:
        return key, f"{key}: is required, and not given ({known[key].description})"
    message, given = _words(detail, key, known.get(key)), detail["input"]
    place = "".join(f"[{part}]" for part in parts[depth:] if part.isdigit())
    hint = "; put it in quotes" if detail["type"] == "string_type" and given is not None else ""
    origin = raw[key].origin if key in raw else ""
    shown = list(given) if isinstance(given, tuple) else given
    return key, f"{key}{place}: {message}, got {shown!r}{hint}{at(origin)}"


def _words(detail: ErrorDetails, key: str, field: FieldInfo | None) -> str:
    """What is wrong with a value, in the terms of the config; an option that is a list is shown as it is written."""
    if detail["type"] not in _WORDS:
        return str(detail["msg"]).replace("Input should", "should", 1)
    choices = _choices(field.annotation) if field is not None else ()
    default = field.default if field is not None and isinstance(field.default, tuple) else (detail["input"],)
    return _WORDS[detail["type"]].format(
        key=key,
        of=f" of {', '.join(choices)}" if choices else "",
        example=",".join(map(str, choices[:2] or default)),
        **detail.get("ctx", {}),
    )


def _choices(annotation: Any) -> tuple[str, ...]:
    """The allowed values in a type such as `tuple[Literal["image", "text"], ...]`; none if any is allowed."""
    inner = get_args(annotation)
    return inner if get_origin(annotation) is Literal else tuple(chain.from_iterable(map(_choices, inner)))


def _other_branch(detail: ErrorDetails) -> bool:
    """Whether pydantic reports the branch of `str | list of str` that the user did not write."""
    return "str" in detail["loc"] and isinstance(detail["input"], list | tuple)


def did_you_mean(key: str, known: list[str]) -> str:
    """The option most likely meant: the same name in another section, a near miss, else the options of the section."""
    section, _, last = key.rpartition(".")
    by_name: dict[str, list[str]] = {}
    for each in known:
        by_name.setdefault(each.rpartition(".")[2], []).append(each)
    beside = [each.rpartition(".")[2] for each in known if each.rpartition(".")[0] == section]
    near = (
        by_name.get(last)
        or [f"{section}.{name}".lstrip(".") for name in difflib.get_close_matches(last, beside, 1, 0.65)]
        or difflib.get_close_matches(key, known, 1, 0.75)
        or by_name.get("".join(difflib.get_close_matches(last, by_name, 1, 0.7)))
    )
    if near:
        return f", did you mean {' or '.join(near)}?"
    return f"; {section} has {', '.join(beside)}" if section and beside else ""


def at(origin: str) -> str:
    """` (configs/x.yaml:3)`, or nothing if the origin is unknown."""
    return f" ({origin})" if origin else ""
