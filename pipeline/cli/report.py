"""The command report: results of runs and sweeps as one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.cli.options import OK, add_command


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    parser = add_command(
        commands,
        "report",
        run_report,
        "write one HTML page with the figures and tables of a run, a sweep or an MLflow experiment",
        "selora report runs/my_sweep",
        "selora report mlflow:selora --uri http://tracking:5000 --out report",
    )
    parser.add_argument(
        "target", metavar="RUN_OR_SWEEP_OR_EXPERIMENT", help="a directory or mlflow:EXPERIMENT; it may still be running"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="directory for the page (default: TARGET/report, or report/EXPERIMENT)"
    )
    parser.add_argument("--uri", help="MLflow tracking server or database of the experiment")


def run_report(arguments: argparse.Namespace) -> int:
    from pipeline.report.run import report

    print(report(arguments.target, arguments.out, arguments.uri))
    return OK
