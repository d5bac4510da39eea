"""The demo's comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.display import text_table


@dataclass(frozen=True)
class MethodResult:
    """The result of one method. Accuracies and shares in [0, 1].

    `kept` and `worst` are relative to the untouched model; `worst` is (dataset, share), None for the untouched one.
    """

    label: str
    id: float
    shift: float
    zero_shot: float
    retrieval: float
    kept: float
    worst: tuple[str, float] | None
    active: tuple[int, int] | None


def active_text(row: MethodResult) -> str:
    """ "12/144 (8 %)", or "-" without blocks."""
    return f"{row.active[0]}/{row.active[1]} ({row.active[0] / row.active[1]:.0%})" if row.active else "-"


def table(rows: Sequence[MethodResult]) -> str:
    """Accuracies and shares kept in percent, gain in points; the last column names the dataset that kept least."""
    head = ("method", "active blocks", "id", "gained", "shift", "zero-shot", "retrieval", "kept", "worst")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        gained = "" if row is rows[0] else f"{100 * (row.id - rows[0].id):+.1f}"
        numbers = [f"{100 * value:.1f}" for value in (row.shift, row.zero_shot, row.retrieval)]
        worst = "" if row.worst is None else f"{row.worst[0]} {100 * row.worst[1]:.1f}"
        shares = f"{100 * row.kept:.1f}", worst
        lines.append((row.label, active_text(row), f"{100 * row.id:.1f}", gained, *numbers, *shares))
    return text_table(head, lines, left=2)
