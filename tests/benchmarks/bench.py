"""python tests/benchmarks/bench.py [--rows 1 2] [--rounds N] [--images PATH] [--out DIR]: product against peer.

Writes benchmarks.md, benchmarks.json and benchmarks.png into DIR (default: build/benchmarks); rows that an earlier call
measured stay. `--images`: a folder or an archive of JPEGs in class folders, for rows 9 and 10 besides their own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the checkout, where it is not installed

import gpu_rows
import kernels
import loader_rows
import rows
from measure import Line, Ratio, prepare
from page import figure, markdown, shown

# Rounds of a row, by what one costs: all CPU rows together take a quarter of an hour on an idle core.
ROUNDS = rows.ROUNDS | {9: 9, 10: 9, 12: 7, 13: 9, 15: 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", help="only these rows (default: all that can run here)")
    parser.add_argument("--rounds", type=int, help="of every row (default: 15, fewer where a round is long)")
    parser.add_argument("--images", type=Path, help="JPEGs in class folders, or an archive of them")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    arguments = parser.parse_args()
    table = rows.ROWS | loader_rows.rows(arguments.images) | gpu_rows.ROWS | {15: kernels.launches}
    left_out = dict.fromkeys(gpu_rows.ROWS, gpu_rows.why_not())
    left_out = {row: why for row, why in left_out.items() if why is not None}
    wanted = sorted(table.keys() - left_out) if arguments.rows is None else arguments.rows
    if unknown := [row for row in wanted if row not in table]:
        parser.error(f"--rows: {unknown} are none of {sorted(table)}")
    if refused := [f"row {row}: {left_out[row]}" for row in wanted if row in left_out]:
        parser.error("; ".join(refused))
    logging.disable(logging.WARNING)  # models without weights are meant
    prepare()
    arguments.out.mkdir(parents=True, exist_ok=True)
    measured, start = _earlier(arguments.out / "benchmarks.json", set(wanted)), time.monotonic()
    for row in wanted:
        began = time.process_time()
        lines = [replace(line, load=os.getloadavg()[0]) for line in table[row](arguments.rounds or ROUNDS.get(row, 15))]
        print("\n".join(shown(line) for line in lines), flush=True)
        print(f"   {time.process_time() - began:.0f} CPU seconds", flush=True)
        measured = sorted(measured + lines, key=lambda line: line.row)
        _write(measured, left_out, arguments.out)
    for row, why in left_out.items():
        print(f"{row:>2} not measured: {why}")
    print(f"{time.monotonic() - start:.0f} s; {arguments.out / 'benchmarks.md'}")
    return 0


def _earlier(file: Path, again: set[int]) -> list[Line]:
    """Lines of an earlier call that this one does not measure again."""
    if not file.is_file():
        return []
    lines = [Line(**each | {"value": Ratio(**each["value"])}) for each in json.loads(file.read_text())]
    return [line for line in lines if line.row not in again]


def _write(lines: list[Line], left_out: dict[int, str], folder: Path) -> None:
    (folder / "benchmarks.json").write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    (folder / "benchmarks.md").write_text(markdown(lines, left_out))
    figure([line for line in lines if line.target is not None], folder / "benchmarks.png")


if __name__ == "__main__":
    sys.exit(main())
