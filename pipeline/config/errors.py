"""Messages about mistakes in a config: the option, the expected value, the value given and where it was written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.passwords import redact


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


def faults_of(error: ValidationError, known: Mapping[str, str], raw: Mapping[str, Raw]) -> list[tuple[str, str]]:
    """(dotted key, or "" for a rule between options; message) of every fault that pydantic found.

    known: {dotted key: description} of every option; raw: the values as they were written.
    """
    return [_fault(detail, known, raw) for detail in error.errors(include_url=False) if not _other_branch(detail)]


def _fault(detail: ErrorDetails, known: Mapping[str, str], raw: Mapping[str, Raw]) -> tuple[str, str]:
    """(dotted key or "", message) of one fault that pydantic found."""
    parts = [str(part) for part in detail["loc"]]
    if not parts:
        return "", str(detail["msg"]).removeprefix("Value error, ")
    depth = next((size for size in (2, 1) if ".".join(parts[:size]) in known), len(parts))
    key = ".".join(parts[:depth])
    if detail["type"] == "missing" and len(parts) == depth:
        return key, f"{key}: is required, and not given ({known[key]})"
    message = str(detail["msg"]).replace("Input should", "should", 1)
    place = "".join(f"[{part}]" for part in parts[depth:] if part.isdigit())
    hint = "; put it in quotes" if detail["type"] == "string_type" and detail["input"] is not None else ""
    origin = raw[key].origin if key in raw else ""
    return key, f"{key}{place}: {message}, got {detail['input']!r}{hint}{at(origin)}"


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
