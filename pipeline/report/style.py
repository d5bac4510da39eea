"""The look of figures: colours that colour-blind readers can distinguish, sizes that are readable on a phone.

Text, axes and lines are drawn in fixed marker colours, which page.py replaces by CSS variables, so that one drawing is
legible on light and dark pages.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, PAPER = "#1d2026", "#d4d7dd", "#fefefe"
# Colours by Okabe and Ito; the second is a lighter tone for a dark page.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#7a7f87",
)  # fmt: skip
ON_DARK = {
    INK: "#e8eaee",
    GRID: "#3a3f48",
    PAPER: "#15171b",
    BLUE: "#4ea8de",
    VERMILION: "#f07f3c",
    GREEN: "#2fc49a",
    ORANGE: "#f2b134",
    PURPLE: "#dd9cc0",
    SKY: "#8fd0f5",
    GREY: "#a1a7b0",
}
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# The groups as figures and tables name them.
GROUPS = {
    "id": "in-distribution",
    "shift": "distribution shift",
    "zero-shot": "zero-shot",
    "retrieval": "retrieval",
    "source": "source set",
}

_ONE, _WIDE, _NARROW = 8.0, 10.6, 3.75  # inches; the page shows the narrow drawing on a phone

_RC: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "figure.titlesize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",  # keep text as text: small, selectable, accessible
}


def measure(group: str, *, classifies: bool) -> str:
    """Label of an axis for this group. classifies: for ViTs, which have a classifier instead of class names."""
    if group == "retrieval":
        return "mean recall (%)"
    if group == "source":
        return "K-NN accuracy (%)"
    return "classifier accuracy (%)" if classifies and group == "id" else "accuracy (%)"


class NoData(Exception):
    """The runs have no data for this figure; the message says what is missing."""


@contextmanager
def styled(name: str) -> Iterator[None]:
    """matplotlib's settings while one figure is drawn and saved; equal input gives equal files."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {**_RC, "svg.hashsalt": name}
    with mpl.rc_context(settings):
        yield


def panels(
    title: str, count: int, *, narrow: bool, height: float = 2.9, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes side by side, or below each other on a phone; `height` of one row in inches."""
    from matplotlib.figure import Figure

    across = 1 if narrow else min(count, columns or 4)
    down = -(-count // across)
    width = _NARROW if narrow else _ONE if across == 1 else _WIDE
    each = min(height, 2.7) if narrow else height
    figure = Figure(figsize=(width, each * down + 0.5), layout="constrained")
    _title(figure, title)
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def retitle(figure: Figure, change: Callable[[str], str]) -> None:
    """Replace the figure's title by a function of it."""
    _title(figure, change(" ".join(figure.get_suptitle().split())))


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(wrapped(text, figure.get_figwidth()), x=0.01, ha="left", fontweight="bold")


def wrapped(text: str, width: float) -> str:
    """`text` wrapped to fit a title of `width` inches."""
    return textwrap.fill(text, max(20, int(width * 9)))


def legend(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """Draw one legend below all panels, with every label that any of them shows."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if not found:
        return
    width = figure.get_figwidth()
    # A long label needs the space of its neighbours.
    columns = max(1, min(columns, int(width * 13) // (6 + max(map(len, found)))))
    _make_room(figure, -(-len(found) // columns))
    figure.legend(list(found.values()), list(found), loc="outside lower left", ncols=columns)


def own_legends(figure: Figure, axes: Sequence[Axes], *, narrow: bool) -> None:
    """Draw a legend below each panel, for panels with different lines; it never covers a line."""
    rows = [len(one.get_legend_handles_labels()[1]) for one in axes]
    _make_room(figure, sum(rows) if narrow else max(rows))
    for one in axes:
        one.legend(loc="upper left", bbox_to_anchor=(0, -0.19 if narrow else -0.16), borderaxespad=0)


def _make_room(figure: Figure, rows: int) -> None:
    """Enlarge the figure by some rows of a legend, so that the panels keep their height."""
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)


def rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    """Draw a logarithmic axis with the ranks as ticks; there are few, and most are powers of two."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank of the blocks")


def reference(axes: Axes, value: float | None, label: str, colour: str = GREY, style: str = ":") -> None:
    """Draw a horizontal line to compare with, in percent; nothing if the value is unknown."""
    if value is not None:
        axes.axhline(100 * value, color=colour, linestyle=style, linewidth=1.3, label=label, zorder=1.5)
