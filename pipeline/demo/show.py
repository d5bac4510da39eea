"""The demo's comparison as a table, a figure and a tracked run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Okabe and Ito's colours, which stay apart for colour-blind readers; grey is the untouched model.
COLOURS = ("#8c8c8c", "#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7")
GROUPS = (("id", "in-distribution\nclothes"), ("shift", "shift\ncatalogue"), ("zero_shot", "zero-shot\n3 sets"),
          ("retrieval", "retrieval\nemoji names"))  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The result of one method. Accuracies and shares in [0, 1]; `kept` relative to the untouched model."""

    label: str
    id: float
    shift: float
    zero_shot: float
    retrieval: float
    kept: float
    active: tuple[int, int] | None


def active_text(row: Row) -> str:
    """ "12/144 (8 %)", or what stands for it without blocks."""
    return f"{row.active[0]}/{row.active[1]} ({row.active[0] / row.active[1]:.0%})" if row.active else "-"


def table(rows: Sequence[Row]) -> str:
    """Accuracies in percent, gain in points, knowledge kept relative to the untouched model."""
    head = ("method", "active blocks", "id", "gained", "shift", "zero-shot", "retrieval", "kept")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        gained = "" if row is rows[0] else f"{100 * (row.id - rows[0].id):+.1f}"
        numbers = [f"{100 * value:.1f}" for value in (row.shift, row.zero_shot, row.retrieval)]
        lines.append((row.label, active_text(row), f"{100 * row.id:.1f}", gained, *numbers, f"{row.kept:.0%}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def draw(rows: Sequence[Row], path: Path) -> Path:
    """The paper's Figure 1 in miniature: accuracy by group, and accuracy against knowledge kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=150)
    bars, trade = figure.subplots(1, 2, width_ratios=(3, 2))
    width = 0.8 / len(rows)
    for number, (row, colour) in enumerate(zip(rows, COLOURS, strict=False)):
        heights = [100 * getattr(row, key) for key, _ in GROUPS]
        places = [group + (number - (len(rows) - 1) / 2) * width for group in range(len(GROUPS))]
        drawn = bars.bar(places, heights, width * 0.92, color=colour, label=row.label)
        bars.bar_label(drawn, fmt="%.0f", fontsize=7, padding=1)
        trade.scatter(100 * row.kept, 100 * row.id, s=90, color=colour, edgecolor="black", linewidth=0.6, zorder=3)
        text = row.label if row.active is None else f"{row.label}, {row.active[0] / row.active[1]:.0%} of blocks"
        # Labels lean inwards, so that none leaves the axes.
        right = row.kept > 0.8
        trade.annotate(text, (100 * row.kept, 100 * row.id), xytext=(-9 if right else 9, 0), textcoords="offset points",
                       fontsize=8, va="center", ha="right" if right else "left")  # fmt: skip
    bars.set_xticks(range(len(GROUPS)), [label for _, label in GROUPS])
    bars.set_ylabel("accuracy or mean recall (%)")
    bars.set_title("Accuracy by group of data sets", loc="left", fontsize=10)
    bars.legend(fontsize=8, frameon=False)
    trade.set_xlabel("knowledge kept (% of the untouched model,\nmean of the other three groups)")
    trade.set_ylabel("in-distribution accuracy (%)")
    trade.set_title("Learned against kept", loc="left", fontsize=10)
    trade.grid(alpha=0.3)
    trade.margins(0.12)
    for axes in (bars, trade):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def record(rows: Sequence[Row], out: Path, figure: Path) -> None:
    """results.json beside the figure, and both in an MLflow run of their own."""
    from pipeline.tracking.tracker import open_tracker

    results = out / "results.json"
    results.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    with open_tracker(out / "comparison", run_name="comparison", uri=f"sqlite:///{out / 'mlflow.db'}") as tracker:
        for row in rows:
            name = row.label.replace(" ", "_").replace("(", "").replace(")", "")
            tracker.metrics(0, {f"{name}/id": row.id, f"{name}/kept": row.kept})
        tracker.artifact(figure)
        tracker.artifact(results)
