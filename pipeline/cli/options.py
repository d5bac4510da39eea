"""Shared by all commands: exit codes, the declaration of a command, and argument types."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

Command = Callable[[argparse.Namespace], int]

OK, FAILED, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130


def add_command(
    commands: Any, name: str, run: Command, summary: str, *examples: str, text_only: bool = False
) -> argparse.ArgumentParser:
    """Add the parser of a command. `text_only`: the command only prints, so a closed pipe ends it silently."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="example:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, text_only=text_only, parser=parser)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="options that replace those of the file, as in adapter.rank=16",
    )


def count(text: str) -> int:
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise argparse.ArgumentTypeError(f"should be a whole number, 0 or more, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number of seconds above 0, got {text!r}")
    return value


def encoding(text: str) -> str:
    try:
        "".encode(text)
    except LookupError:
        raise argparse.ArgumentTypeError(f"should be an encoding of text, as in cp1252, got {text!r}") from None
    return text


def part(text: str) -> tuple[int, int]:
    """ "3/8" as (3, 8)."""
    found = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", text)
    if found is None or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"should be I/N with I from 1 to N, got {text!r}")
    return int(found[1]), int(found[2])


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"should be between 0 and 1, got {text!r}")
    return value


def strength(text: str) -> float | str:
    """ "auto", or a share."""
    return text if text == "auto" else share(text)
