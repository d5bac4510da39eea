"""python tests/benchmarks/bench.py [--rows 1 2] [--rounds N] [--out DIR]: the table and a figure, product against peer.

Writes benchmarks.md, benchmarks.json and benchmarks.png into DIR (default: build/benchmarks).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the checkout, where it is not installed

import torch
from matplotlib.figure import Figure
from measure import Line, Ratio, prepare
from rows import ROUNDS, ROWS

WITHOUT = {
    9: "loader against webdataset + PIL and ImageFolder: not in this script",
    10: "three evaluation passes from the decoded cache: not in this script",
    12: "GPU train step of ViT-B/16, bf16, batch 256: needs a CUDA device",
    13: "GPU inference of ViT-B/16, bf16: needs a CUDA device",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", choices=sorted(ROWS), default=sorted(ROWS))
    parser.add_argument("--rounds", type=int, help="of every row (default: 15, fewer where a round is long)")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    arguments = parser.parse_args()
    prepare()
    arguments.out.mkdir(parents=True, exist_ok=True)
    measured = _earlier(arguments.out / "benchmarks.json", set(arguments.rows))
    for row in arguments.rows:
        start = time.process_time()
        lines = [replace(line, load=os.getloadavg()[0]) for line in ROWS[row](arguments.rounds or ROUNDS.get(row, 15))]
        print("\n".join(shown(line) for line in lines), flush=True)
        print(f"   {time.process_time() - start:.0f} CPU seconds", flush=True)
        measured = sorted(measured + lines, key=lambda line: line.row)
        write(measured, arguments.out)
    return 0


def _earlier(file: Path, again: set[int]) -> list[Line]:
    """Lines of an earlier call that this one does not measure again."""
    if not file.is_file():
        return []
    lines = [Line(**each | {"value": Ratio(**each["value"])}) for each in json.loads(file.read_text())]
    return [line for line in lines if line.row not in again]


def shown(line: Line) -> str:
    return f"{line.row:>2} {line.name:<16} {line.what:<46} {line.value}  {verdict(line)}"


def verdict(line: Line) -> str:
    if line.target is None:
        return ""
    return f"{'>=' if line.at_least else '<='} {line.target:g} {'met' if line.met else 'MISSED'}"


def write(lines: list[Line], folder: Path) -> None:
    (folder / "benchmarks.json").write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    (folder / "benchmarks.md").write_text(markdown(lines))
    figure([line for line in lines if line.target is not None], folder / "benchmarks.png")


def markdown(lines: list[Line]) -> str:
    head = [
        "# Benchmarks",
        "",
        f"torch {torch.__version__}, {platform.machine()}, one thread, CPU seconds, variants in turn in one process:",
        "median of the ratios within a round and their quartiles. Load: of the machine when the row ended.",
        "",
        "| # | row | ratio | median [quartiles] | target | limit | load |",
        "|---|---|---|---|---|---|---|",
    ]
    body = [
        f"| {line.row} | {line.name} | {line.what} | {line.value} | {verdict(line)} "
        f"| {line.limit}{f' ({line.note})' if line.note else ''} | {line.load:.1f} |"
        for line in lines
    ]
    present = {line.row for line in lines}
    missing = [f"- {row}: {why}" for row, why in WITHOUT.items() if row not in present]
    return "\n".join([*head, *body, "", "Not measured here:", "", *missing]) + "\n"


def figure(lines: list[Line], file: Path) -> None:
    """Each ratio over its target, turned so that beyond 1 the target is met."""
    scores = [(line.value.value / line.target) ** (1 if line.at_least else -1) for line in lines if line.target]
    drawing = Figure(figsize=(8, 0.3 * len(lines) + 1.2), layout="constrained")
    axes = drawing.subplots()
    axes.barh(range(len(lines)), scores, color=["tab:green" if line.met else "tab:red" for line in lines])
    axes.set_yticks(range(len(lines)), [f"{line.row} {line.name}: {line.what}" for line in lines], fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("measured over target (beyond 1: met)")
    drawing.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
