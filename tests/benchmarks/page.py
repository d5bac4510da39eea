"""The benchmark's output: a line in the terminal, benchmarks.md, and one figure of all targets."""

from __future__ import annotations

import math
import os
import platform
import re
from itertools import groupby
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import Line

# What each row compares, and in what unit.
TITLES = {
    1: "LoRA of rank 256 on one linear, forward and backward",
    2: "DoRA of rank 256 on one linear, forward and backward",
    3: "LoRA of rank 16 on one linear against full fine-tuning",
    4: "Training step of a small CLIP, by rank",
    5: "Memory that a DoRA step keeps for its backward",
    6: "Training step with 5 % of the blocks open",
    7: "The gradient of a gate",
    8: "Inference of ViT-B/16 at rank 256",
    9: "Training loader, from JPEGs in shards to pixels",
    10: "Three evaluation passes, from JPEGs to pixels",
    11: "Contrastive loss",
    12: "Training step of ViT-B/16 in bf16 on a GPU",
    13: "Inference of ViT-B/16 in bf16 on a GPU",
    14: "Training step with reference samples",
    15: "Kernels that an eager training step of ViT-B/16 launches on a GPU, counted on shapes",
}
# Okabe and Ito's colours, which all eyes tell apart; the marks differ in form, too.
MET, MISSED, LIMIT = "#0072B2", "#D55E00", "#555555"


def shown(line: Line) -> str:
    return f"{line.row:>2} {line.name:<24} {line.what:<46} {line.value}  {verdict(line)}"


def verdict(line: Line, missed: str = "MISSED") -> str:
    if line.target is None:
        return ""
    return f"{'≥' if line.at_least else '≤'} {line.target:g} {'met' if line.met else missed}"


def markdown(lines: list[Line], left_out: dict[int, str]) -> str:
    judged = [line for line in lines if line.target is not None]
    head = [
        "# Benchmarks",
        "",
        f"{sum(bool(line.met) for line in judged)} of {len(judged)} targets met. Product and peer run in turn in one",
        "process on one thread; a figure is the median over the rounds of the ratio of their CPU seconds, with its",
        "quartiles. *A / B* of 2 says that A takes twice as long as B. *Limit* is what the arithmetic or the hardware",
        "allows. `make bench` rewrites this page.",
        "",
        f"{_processor()}, {os.cpu_count()} cores; torch {torch.__version__}; load of the machine "
        f"{_range([line.load for line in lines])}.",
        "",
        "![Each figure against its target](benchmarks.png)",
    ]
    body: list[str] = []
    for row, group in groupby(lines, key=lambda line: line.row):
        body += ["", f"## {row}. {TITLES[row]}", "", "| | ratio | median [quartiles] | target | limit |"]
        body += ["| --- | --- | --- | --- | --- |"]
        inside = list(group)
        body += [
            f"| {line.name} | {line.what} | {line.value} | {verdict(line, '**missed**')} | {line.limit} |"
            for line in inside
        ]
        notes = [f"{line.name}: {line.note}." for line in inside if line.note]
        body += ["", *notes] if notes else []
    missing = [f"- {row}. {TITLES[row]}: {why}." for row, why in left_out.items()]
    return "\n".join([*head, *body, *(["", "## Not measured here", "", *missing] if missing else [])]) + "\n"


def figure(lines: list[Line], file: Path) -> None:
    """Each figure over its target, turned so that more is better, with its quartiles and its physical limit."""
    drawing = Figure(figsize=(10, 0.26 * len(lines) + 1.8), layout="constrained")
    axes = drawing.subplots()
    for place, line in enumerate(lines):
        low, middle, high = sorted(
            _over_target(line, value) for value in (line.value.low, line.value.value, line.value.high)
        )
        colour = MET if line.met else MISSED
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(middle, place, marker="o" if line.met else "X", color=colour, markersize=6)
        limit = _limit(line)
        if limit is not None:
            axes.plot(_over_target(line, limit), place, marker="|", color=LIMIT, markersize=9, markeredgewidth=1.5)
    axes.axvline(1, color="black", linewidth=1)
    _label(axes, lines)
    drawing.savefig(file, dpi=130)


def _label(axes: Axes, lines: list[Line]) -> None:
    axes.set_title("Measured against target: right of 1 is better than asked for", loc="left", fontsize=11)
    axes.set_xlabel("times the target (logarithmic)")
    axes.set_xscale("log")
    ticks = [
        tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 30, 100) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(lines)), [f"{line.row}  {line.name}: {line.what}" for line in lines], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for marker, colour, meaning in (("o", MET, "met"), ("X", MISSED, "missed"), ("|", LIMIT, "physical limit")):
        axes.plot([], [], marker=marker, color=colour, linestyle="", label=meaning)
    drawing = axes.get_figure()
    assert isinstance(drawing, Figure)
    drawing.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _over_target(line: Line, value: float) -> float:
    assert line.target is not None
    return (value / line.target) ** (1 if line.at_least else -1)


def _limit(line: Line) -> float | None:
    """The number that a limit begins with, where it does."""
    found = re.match(r"\d*\.?\d+", line.limit)
    value = None if found is None else float(found[0])
    return value if value and math.isfinite(value) and not line.limit.startswith("1/") else None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def _range(loads: list[float]) -> str:
    return f"{min(loads):.1f} to {max(loads):.1f}" if loads else "unknown"
