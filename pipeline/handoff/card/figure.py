"""The figure of a model card: gain and share kept and, if evaluated, the curve over strengths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# By Okabe and Ito, as in `selora report`.
_BEFORE, _AFTER, _KEPT = "#7a7f87", "#0072b2", "#009e73"
_MOST_ROWS = 24


def write_figure(file: Path, results: Mapping[str, Any], curve: Mapping[str, Any] | None, strength: float) -> None:
    """Write a PNG of the results in percent, with the curve to their right if there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(results["datasets"].items())[:_MOST_ROWS]
    figure = Figure(figsize=(9.6 if curve else 5.2, 1.3 + 0.28 * len(rows) if not curve else 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    _draw_results(axes[0], rows)
    if curve:
        _draw_curve(axes[1], curve, strength)
    figure.savefig(file, dpi=130, metadata={"Software": None})


def _draw_results(axes: Any, rows: list[tuple[str, Mapping[str, Any]]]) -> None:
    for y, (_, row) in enumerate(rows):
        after, before = 100 * row["value"], row.get("baseline")
        if before is not None:
            axes.plot([100 * before, after], [y, y], color="#d4d7dd", zorder=1)
            axes.scatter([100 * before], [y], color=_BEFORE, label="untouched" if y == 0 else None, zorder=2)
        axes.scatter([after], [y], color=_AFTER, marker="s", label="this model" if y == 0 else None, zorder=3)
    axes.set_yticks(range(len(rows)), [f"{name} ({row['group']})" for name, row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="%", title="Learned and kept")
    axes.legend(frameon=False, loc="best")


def _draw_curve(axes: Any, curve: Mapping[str, Any], strength: float) -> None:
    alphas = curve["alphas"]
    series = {"id": [curve["groups"][str(alpha)].get("id") for alpha in alphas]}
    series["kept"] = [curve.get("kept", {}).get(str(alpha)) for alpha in alphas]
    for (name, values), colour, marker in zip(series.items(), (_AFTER, _KEPT), ("s", "o"), strict=True):
        points = [(alpha, 100 * value) for alpha, value in zip(alphas, values, strict=True) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    axes.axvline(strength, color=_BEFORE, linestyle=":", label="this model")
    axes.set(xlabel="strength of the fine-tuning (alpha)", ylabel="%", title="Between untouched and fine-tuned")
    axes.legend(frameon=False, loc="best")
