"""The command line: one function per command; a stage is imported only when its command is chosen.

No option duplicates a key of the config: the config file and key=value define a run, and ranks come from the launcher's
environment. No option may be a prefix of one of torchrun's, which accepts abbreviations anywhere in its command line.
"""

from __future__ import annotations

import argparse
import codecs
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Sequence

from pipeline.cli import cost, data, demo, doctor, handoff, report, runs, sweep, vectors
from pipeline.cli.options import FAILED, INTERRUPTED, OK, USER_MISTAKE
from pipeline.config import ConfigError, Ended, describe
from pipeline.config.errors import did_you_mean
from pipeline.faults import lost_worker, one_line
from pipeline.sockets import reach_loopback

# In the order of `selora --help`.
FAMILIES = (data, runs, sweep, cost, report, handoff, vectors, doctor, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code. 0: done; 1: it failed or found something wrong; 2: a mistake of the user or a full disk, with a
        message; 130: a signal stopped it, and its progress is saved if the command can be continued.
    """
    try:
        if argv is None:
            _use_utf8()
            reach_loopback(os.environ)
        return _run(_parse(_without_local_rank(sys.argv[1:] if argv is None else argv)))
    except KeyboardInterrupt:
        print(f"{_rank()}interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    """Run a command and return its exit code; errors that the user can act on are printed in one line."""
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_output()
        if arguments.text_only:  # `selora config … | head` ends silently
            return OK
        print(f"{_rank()}selora {arguments.command}: ended early: its output was closed", file=sys.stderr)
        return FAILED
    except ConfigError as error:
        print(f"{_rank()}selora {arguments.command}: {_message(error)}", file=sys.stderr)
        return USER_MISTAKE
    except Ended as error:
        print(f"{_rank()}selora {arguments.command}: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        lost = lost_worker(error)
        line = lost or one_line(error)
        if line is None:
            raise
        print(f"{_rank()}selora {arguments.command}: {line}", file=sys.stderr)
        _drop_output()
        return FAILED if lost else USER_MISTAKE


def _use_utf8() -> None:
    """Restart Python in UTF-8 mode under an ASCII locale, which could not name every file that a config may name.

    Under any other locale only the printed output is adapted.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Keep Python's flush at exit from failing on the closed pipe or full disk a second time."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; building it imports no stage."""
    parser = argparse.ArgumentParser(
        prog="selora",
        description="Fine-tune CLIP on your own images without losing what it knew.",
        epilog="The usual order: inspect, pack, verify, train or sweep, evaluate, report, promote. "
        "`selora COMMAND --help` has examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"selora {importlib.metadata.version('selora')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for family in FAMILIES:
        family.add(commands)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Accept key=value after an option; argparse closes a list of positionals at the first option."""
    arguments, left = build_parser().parse_known_args(argv)
    late = [argument for argument in left if re.match(r"[a-z][a-z_.]*=", argument)]
    if len(late) < len(left) or (late and not hasattr(arguments, "overrides")):
        arguments.parser.error(_unknown(arguments, left, argv))
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    return arguments


def _unknown(arguments: argparse.Namespace, left: Sequence[str], argv: Sequence[str]) -> str:
    """The message about arguments that the chosen command does not have, with the one most likely meant."""
    flag = next((each for each in left if each.startswith("--")), "")
    name, _, value = flag.partition("=")
    key = name.removeprefix("--")
    configured = list(describe()) if hasattr(arguments, "overrides") else []
    if key in configured:
        following = argv[argv.index(flag) + 1 :]
        value = value or next((word for word in following[:1] if not word.startswith("-")), "VALUE")
        return f"{name}: options of the config are written without dashes, as in {key}={value}"
    own = [text for action in arguments.parser._actions for text in action.option_strings]
    meant = did_you_mean(name, own) or did_you_mean(key, configured) if flag else ""
    return f"unrecognized arguments: {' '.join(left)}{meant}"


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop the --local_rank=N that deepspeed's launcher adds in front of the command; LOCAL_RANK is set as well."""
    return [argument for argument in argv if not re.fullmatch(r"--local[_-]rank=\d+", argument)]


def _rank() -> str:
    """Prefix of a message: every rank finds the same mistake, so all but rank 0 print their number."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def _message(error: ConfigError) -> str:
    text = str(error)
    return text if "\n" not in text else "\n  " + text.replace("\n", "\n  ")
