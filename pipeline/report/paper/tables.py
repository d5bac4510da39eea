"""Tables 1 to 15 of the paper as printed (arXiv 2501.15377), its errata, and the arithmetic that finds them.

published/table-NN.csv has every cell as printed; published/errata.yaml lists the wrong ones, with the reason and the
check below that shows it. An erratum without a check concerns the text, or cannot be decided from the tables.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

Check = Literal["mean", "blocks", "copied", "recall"]

KEYS = ("method", "rank", "lam", "blocks")
MEANS = ("inner mean", "mean")
TABLES = tuple(range(1, 16))
# Number of gates: 12 layers x 6 projections x towers (DINO has one, CLIP two).
GATES = {number: 72 if number < 10 else 144 for number in TABLES}
# Tables 12-15 repeat two columns of Tables 10 and 11, with one decimal less.
_SOURCE = {12: 10, 14: 10, 13: 11, 15: 11}
_REPEATED = ("blocks", "IN-1K")
# Means with one decimal were computed from unrounded inputs; the sum of both roundings never exceeds this.
_TOLERANCE = {1: Fraction("0.06"), 2: Fraction("0.011")}


@dataclass(frozen=True)
class PaperRow:
    """One row of one table, cells as printed ("" where the paper has a dash)."""

    table: int
    cells: dict[str, str]

    @property
    def name(self) -> str:
        """Unique name of the row in its table: "LoRA 128", "Ours 16 0.5", in Tables 1 and 2 "Ours 6.94"."""
        keys = ("method", "rank", "lam") if "rank" in self.cells else ("method", "blocks")
        return " ".join(self.cells[key] for key in keys if self.cells.get(key))

    @property
    def values(self) -> dict[str, Fraction]:
        """The measured columns, without means."""
        return {key: Fraction(cell) for key, cell in self.cells.items() if key not in KEYS + MEANS}


@dataclass(frozen=True)
class Contradiction:
    """A printed number that others contradict. `expected` is None if the correct value is not known."""

    check: Check
    table: int
    row: str
    column: str
    printed: str
    expected: str | None


@dataclass(frozen=True)
class Erratum:
    """One entry of the list; `finding` is the result of its check, None for an error in the text."""

    number: int
    where: str
    printed: str
    correct: str
    finding: Contradiction | None


@cache
def table(number: int) -> tuple[PaperRow, ...]:
    """The rows of one table, from top to bottom."""
    text = files("pipeline.report.paper").joinpath("published", f"table-{number:02d}.csv").read_text(encoding="utf-8")
    return tuple(PaperRow(number, cells) for cells in csv.DictReader(text.splitlines()))


@cache
def errata() -> tuple[Erratum, ...]:
    """All known errors of the paper, in the order of their numbers."""
    text = files("pipeline.report.paper").joinpath("published", "errata.yaml").read_text(encoding="utf-8")
    return tuple(_erratum(entry) for entry in yaml.safe_load(text))


def _erratum(entry: dict[str, Any]) -> Erratum:
    finding = None
    if "check" in entry:
        names = ("check", "table", "row", "column", "printed", "expected")
        finding = Contradiction(**{name: entry[name] for name in names})
        where = f"Table {finding.table}, {finding.row}, {finding.column}"
    else:
        where = str(entry["where"])
    return Erratum(int(str(entry["number"])), where, str(entry["printed"]), str(entry["correct"]), finding)


def wrong_cells(number: int) -> dict[tuple[str, str], str]:
    """{(row, column) of a wrong cell of a table: a sentence with the correct value}."""
    return {
        (found.row, found.column): f"{erratum.where}: {erratum.printed}, should be {erratum.correct}"
        for erratum in errata()
        if (found := erratum.finding) is not None and found.table == number
    }


def recompute(row: PaperRow) -> dict[str, Fraction]:
    """The mean columns of a row: the inner one over all datasets but the target, the outer one over both halves."""
    _, *others = row.values.values()
    inner = sum(others, Fraction()) / len(others)
    return {"inner mean": inner, "mean": (_target(row) + inner) / 2}


def _target(row: PaperRow) -> Fraction:
    """The first measured column, with its second decimal where another table has it."""
    printed = next(iter(row.values.values()))
    for source in table(_SOURCE[row.table]) if row.table in _SOURCE else ():
        exact = next(iter(source.values.values()))
        if source.name == row.name and abs(exact - printed) <= Fraction("0.05"):
            return exact
    return printed


def findings() -> list[Contradiction]:
    """All numbers in the tables that contradict others."""
    rows = [row for number in TABLES for row in table(number)]
    found = [finding for row in rows for check in (_means, _blocks, _recalls) for finding in check(row)]
    return found + [finding for copy, source in _pairs() for finding in _copies(copy, source)]


def _means(row: PaperRow) -> Iterator[Contradiction]:
    for column, value in recompute(row).items():
        printed = row.cells.get(column)
        if printed is not None and abs(Fraction(printed) - value) > _TOLERANCE[_decimals(row, printed)]:
            yield Contradiction("mean", row.table, row.name, column, printed, _shown(value, printed))


def _decimals(row: PaperRow, printed: str) -> int:
    # A row whose numbers all end in 0 has one decimal, whatever is printed: the paper's row of CLIP.
    padded = all(cell.endswith("0") for key, cell in row.cells.items() if cell and key not in KEYS)
    return 1 if padded else max(1, min(2, len(printed.partition(".")[2])))


def _blocks(row: PaperRow) -> Iterator[Contradiction]:
    printed = row.cells["blocks"]
    if printed in ("", "100"):
        return
    gates = GATES[row.table]
    exact = Fraction(round(Fraction(printed) / 100 * gates), gates) * 100
    if _shown(exact, printed) != printed:
        yield Contradiction("blocks", row.table, row.name, "blocks", printed, _shown(exact, printed))


def _recalls(row: PaperRow) -> Iterator[Contradiction]:
    """R@5 that does not exceed R@1: the first five include the first."""
    for column, cell in row.cells.items():
        first = row.cells.get(column.replace("@5", "@1"))
        if column.endswith("@5") and first is not None and Fraction(cell) <= Fraction(first):
            yield Contradiction("recall", row.table, row.name, column, cell, None)


def _pairs() -> Iterator[tuple[tuple[PaperRow, tuple[str, ...]], PaperRow]]:
    for copy, source in _SOURCE.items():
        for one, other in zip(table(copy), table(source), strict=True):
            yield (one, _REPEATED), other
    # Table 1's "Ours" is Table 4's rank 16 at lambda 1 and 0.5; Table 2's l1 is its rank 128 at lambda 1.
    by_name = {row.name: row for row in table(4)}
    ours = [row for row in table(1) if row.cells["method"] == "Ours"]
    columns = ("blocks", "CIFAR-100", "IN-100")
    yield (ours[0], columns), by_name["Ours 16 1"]
    yield (ours[1], columns), by_name["Ours 16 0.5"]
    yield (table(2)[0], columns), by_name["Ours 128 1"]


def _copies(copy: tuple[PaperRow, tuple[str, ...]], source: PaperRow) -> Iterator[Contradiction]:
    row, columns = copy
    for column in columns:
        printed, original = row.cells[column], source.cells[column]
        if not printed or not original:
            continue
        unit = Fraction(1, 10 ** min(_places(printed), _places(original)))
        # The source may itself be rounded, so its last digit is accepted either way.
        if abs(Fraction(printed) - Fraction(original)) > unit * Fraction("0.501"):
            yield Contradiction("copied", row.table, row.name, column, printed, _shown(Fraction(original), printed))


def _places(printed: str) -> int:
    return len(printed.partition(".")[2])


def _shown(value: Fraction, printed: str) -> str:
    """`value` rounded half up to as many decimals as `printed` has."""
    places = _places(printed)
    scaled = int(value * 10**places + Fraction(1, 2))
    return f"{scaled / 10**places:.{places}f}"
