"""A table of the report, as the page and the CSV files show it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["run", "reference", "paper", "best", "chosen", "failed"]


@dataclass(frozen=True)
class Table:
    """Cells as texts. `head`: (spanning label, its columns) from left to right; `kinds`: the kind of each row."""

    key: str
    title: str
    head: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Sequence[str]]
    kinds: Sequence[Kind]
    notes: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        return [column for _, columns in self.head for column in columns]

    @property
    def spans(self) -> bool:
        """Whether any columns have a spanning label."""
        return any(above for above, _ in self.head)

    def csv(self) -> str:
        """One header line, with spanning labels in front of their columns."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["row", *(f"{above} {name}".strip() for above, names in self.head for name in names)])
        writer.writerows([kind, *row] for kind, row in zip(self.kinds, self.rows, strict=True))
        return out.getvalue()


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"
