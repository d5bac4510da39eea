"""The command demo: the whole pipeline on embedded data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.cli.options import OK, add_command


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    parser = add_command(
        commands,
        "demo",
        run_demo,
        "run the whole pipeline on embedded photos: sweep, report, promotion, prediction",
        "selora demo",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="directory for everything that is written (default: runs/demo)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the fine-tuning (default: 0)")


def run_demo(arguments: argparse.Namespace) -> int:
    from pipeline.demo.run import demo

    demo(arguments.out, arguments.seed)
    return OK
