"""How durations, sizes and tables are shown as text."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDE = 10_000  # columns: a line is never wrapped
# The lines of a box: top, head, below the head, rows, ...: only a rule below the head.
_RULE = "    \n    \n----\n    \n    \n    \n    \n    \n"


def duration(seconds: float) -> str:
    """ "0:35" or "1:02:03"; "?" for a value that is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(number: float) -> str:
    """A number of bytes with three digits and a decimal unit, as in "1.25 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def rich_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, styles: Iterable[str] = (), title: str = ""
) -> Table:
    """A table for a terminal.

    Args:
        head: names of the columns; empty: no line of names.
        rows: one text for each column.
        left: number of columns aligned to the left; the others are aligned to the right.
        styles: rich's style of each row; missing ones are plain.
        title: line above the table.
    """
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    found = [tuple(row) for row in rows]
    styles = [*styles, *[""] * len(found)]
    table = Table(
        title=title or None,
        title_justify="left",
        box=Box(_RULE, ascii=True),
        show_edge=False,
        show_header=bool(head),
        header_style="",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for number in range(len(head) if head else max(map(len, found), default=0)):
        name = Text(head[number]) if head else ""
        table.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    for row, style in zip(found, styles, strict=False):
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """The table of `rich_table` as plain text without colours, whatever the terminal and its width."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=_WIDE, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(rich_table(head, rows, left=left), soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").splitlines())
