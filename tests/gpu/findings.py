"""The findings of first light: tables and checks, written after every stage, so that an interrupted run leaves some."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of one stage."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A claim, what was found, and whether it holds."""

    claim: str
    found: str
    holds: bool


@dataclass
class Findings:
    """Everything found so far, on its way to first_light.json and first_light.md.

    Attributes:
        folder: where both files go.
        machine: what the figures belong to: card, torch, cores.
        minutes: the time there is.
    """

    folder: Path
    machine: dict[str, str]
    minutes: float
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.minutes * 60 - (time.monotonic() - self._start)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> None:
        """Keep a table and print it."""
        found = Table(title, tuple(head), [tuple(row) for row in rows], note)
        self.tables.append(found)
        print(f"\n{_aligned(found)}\n{note}".rstrip(), flush=True)

    def check(self, claim: str, holds: bool, found: str) -> None:
        """Keep a check and print it."""
        self.checks.append(Check(claim, found, bool(holds)))
        print(f"  {'holds' if holds else 'FAILS'}: {claim} ({found})", flush=True)

    def skip(self, what: str, why: str) -> None:
        """Record something that was not run."""
        self.left_out[what] = why
        print(f"  left out: {what}: {why}", flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and write what is known after it."""
        began = time.monotonic()
        print(f"\n== {name}, {self.left:.0f} s left", flush=True)
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 1)
            self.write()

    @property
    def failed(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.holds]

    def write(self) -> None:
        """Both files, whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": self.machine,
            "seconds": self.seconds,
            "checks": [asdict(each) for each in self.checks],
            "tables": [asdict(each) for each in self.tables],
            "left_out": self.left_out,
        }
        (self.folder / "first_light.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.folder / "first_light.md").write_text(self.markdown())

    def markdown(self) -> str:
        """The page."""
        parts = [f"# First light on {self.machine['card']}", ", ".join(f"{k} {v}" for k, v in self.machine.items())]
        rows: list[tuple[Cell, ...]] = [(c.claim, c.found, "yes" if c.holds else "**no**") for c in self.checks]
        parts.append("## Checks\n\n" + _markdown(("claim", "found", "holds"), rows))
        parts += [
            f"## {t.title}\n\n{_markdown(t.head, t.rows)}" + (f"\n{t.note}\n" if t.note else "") for t in self.tables
        ]
        if self.left_out:
            parts.append("## Left out\n\n" + "\n".join(f"- {what}: {why}" for what, why in self.left_out.items()))
        return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def shown(cell: Cell) -> str:
    """A cell as text: four digits of a number, a dash for nothing."""
    if cell is None or (isinstance(cell, float) and cell != cell):
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [tuple(head), ("---", *["--:"] * (len(head) - 1)), *(tuple(map(shown, row)) for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _aligned(table: Table) -> str:
    rows = [table.head, *(tuple(map(shown, row)) for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([table.title, *(line.rstrip() for line in lines)])
