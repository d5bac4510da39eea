"""Figures of single runs: groups side by side, Pareto front, training curves, strength curve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipeline.report.records import Collection, Run
from pipeline.report.style import CYCLE, GREY, GROUPS, INK, MARKERS, ORANGE, NoData, legend, measure, panels
from pipeline.selection.drift import PREFIX, last_drift, learned_limit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 6  # runs with a colour of their own; more colours could not be distinguished
FEWEST_DRIFTS = 3  # two points are always on a line


class RunLook(NamedTuple):
    """The look of a run in every figure: its own if there are few runs, otherwise that of its method."""

    label: str
    colour: str
    marker: str


def looks(collection: Collection) -> dict[str, RunLook]:
    """{run: its look}, the same in all figures of a report."""
    few = len(collection.runs) <= MOST_NAMED
    keys = {run.name: run.name if few else run.settings.method for run in collection.runs}
    order = list(keys) if few else sorted(set(keys.values()))
    found = {}
    for run in collection.runs:
        number = order.index(keys[run.name])
        label = run.label if few else run.settings.method
        found[run.name] = RunLook(label, CYCLE[number % len(CYCLE)], MARKERS[number % len(MARKERS)])
    return found


def _by_look(collection: Collection, names: Iterable[str]) -> list[tuple[RunLook, list[str]]]:
    """The runs of each look, in the order of the looks."""
    found, chosen = looks(collection), set(names)
    members: dict[RunLook, list[str]] = {}
    for name, look in found.items():
        if name in chosen:
            members.setdefault(look, []).append(name)
    return sorted(members.items(), key=lambda item: MARKERS.index(item[0].marker))


def groups(collection: Collection, *, narrow: bool) -> Figure:
    """Draw a bar for each run and group, next to the untouched model's."""
    runs = [run for run in collection.runs if run.summary is not None]
    if not runs:
        raise NoData("needs the results of an evaluation")
    if len(runs) > MOST_NAMED:
        raise NoData(f"{len(runs)} runs are too many for bars; see the table below")
    names = [name for name in GROUPS if any(run.group(name) is not None for run in runs)]
    figure, (axes,) = panels("Accuracy by group", 1, narrow=narrow, height=3.4)
    before = [collection.untouched.get(name) for name in names]
    bars = [("untouched model", before, GREY)] if collection.untouched else []
    look = looks(collection)
    bars += [(run.label, [run.group(name) for name in names], look[run.name].colour) for run in runs]
    width = 0.84 / len(bars)
    for number, (label, values, colour) in enumerate(bars):
        shift = (number - (len(bars) - 1) / 2) * width
        known = [(place + shift, 100 * value) for place, value in enumerate(values) if value is not None]
        x, heights = [x for x, _ in known], [height for _, height in known]
        drawn = axes.bar(x, heights, width * 0.92, color=colour, label=label)
        if not narrow or len(bars) < 4:
            axes.bar_label(drawn, fmt="%.1f" if len(bars) < 5 else "%.0f", fontsize=8, padding=1, color=INK)
    for place, name in enumerate(names):
        chance = collection.chance(name)
        if chance is not None:
            label = "guessing" if place == 0 else "_"
            axes.hlines(100 * chance, place - 0.44, place + 0.44, colors=ORANGE, linestyles=":", label=label)
    axes.set_xticks(range(len(names)), [GROUPS[name].replace(" ", "\n") for name in names])
    axes.set_xlabel("group of data sets")
    axes.set_ylabel("accuracy or mean recall (%)" if "retrieval" in names else "accuracy (%)")
    axes.grid(axis="x", visible=False)
    legend(figure, [axes])
    return figure


def pareto(collection: Collection, *, narrow: bool) -> Figure:
    """Draw in-distribution accuracy against knowledge kept: the front as a line, the chosen model as a star."""
    points = collection.points
    if not points:
        raise NoData("needs results of id and of another group, and the untouched model's")
    figure, (axes,) = panels("Learned against kept", 1, narrow=narrow, height=3.9)
    front = [points[name] for name in collection.front]
    if len(front) > 1:
        axes.plot([100 * one.kept for one in front], [100 * one.id for one in front], color=GREY, linewidth=1.2,
                  zorder=1.5, label="Pareto front")  # fmt: skip
    runs = [run for run in collection.runs if run.name in points]
    for look, members in _by_look(collection, points):
        axes.plot([100 * points[name].kept for name in members], [100 * points[name].id for name in members],
                  linestyle="none", marker=look.marker, color=look.colour, label=look.label, markersize=7)  # fmt: skip
    for run in (run for run in runs if run.curve):
        axes.plot([100 * one.kept for one in run.curve], [100 * one.id for one in run.curve],
                  color=looks(collection)[run.name].colour, linewidth=1, alpha=0.7, zorder=1.8)  # fmt: skip
    chosen = collection.chosen
    if chosen is not None:
        at = None if collection.floor is None else chosen.floors.get(collection.floor)
        one = points[chosen.name] if at is None else at
        axes.plot(100 * one.kept, 100 * one.id, linestyle="none", marker="*", markersize=17, markeredgecolor=INK,
                  color=looks(collection)[chosen.name].colour, label=f"chosen: {chosen.label}", zorder=4)  # fmt: skip
    if "id" in collection.untouched:
        axes.plot(100, 100 * collection.untouched["id"], linestyle="none", marker="o", markersize=7, color=GREY,
                  label="untouched model")  # fmt: skip
    elif collection.untouched:
        axes.axvline(100, color=GREY, linestyle=":", linewidth=1.3, label="untouched model, which has no classifier")
    what = "mean over the data sets other than in-distribution"
    if {each["group"] for each in collection.datasets.values()} == {"id", "source"}:
        what = "K-NN on its source set"
    axes.set_xlabel(f"knowledge kept (% of the untouched model{'' if narrow else f', {what}'})")
    axes.set_ylabel(_learned(collection))
    axes.margins(0.1)
    if len(runs) <= (3 if narrow else 2 * MOST_NAMED):  # more names would overlap
        _name_points(axes, collection, runs)
    legend(figure, [axes])
    return figure


def drift(collection: Collection, *, narrow: bool) -> Figure:
    """Draw the share that each finished run kept against its drift on held-out reference samples."""
    found = {
        run.name: (last, collection.points[run.name].kept)
        for run in collection.runs
        if run.name in collection.points and (last := last_drift(run.history)) is not None
    }
    if len(found) < FEWEST_DRIFTS:
        raise NoData(f"needs {FEWEST_DRIFTS} runs with reference data (section keep) and results")
    figure, (axes,) = panels("Drift against kept", 1, narrow=narrow, height=3.4)
    for look, members in _by_look(collection, found):
        axes.plot([found[name][0] for name in members], [100 * found[name][1] for name in members],
                  linestyle="none", label=look.label, markersize=7, marker=look.marker, color=look.colour)  # fmt: skip
    if collection.floor is not None:
        axes.axhline(100 * collection.floor, color=GREY, linestyle=":", linewidth=1.3, label="floor")
        if (limit := learned_limit(found.values(), collection.floor)) is not None:
            label = f"largest drift above the floor: {limit:.3g}"
            axes.axvline(limit, color=GREY, linestyle="--", linewidth=1.3, label=label)
    axes.set_xlabel("drift on held-out reference samples")
    axes.set_ylabel("knowledge kept (%)")
    axes.margins(0.1)
    legend(figure, [axes])
    return figure


def _learned(collection: Collection) -> str:
    shown = measure("id", classifies=collection.classifies)
    return shown if collection.classifies else f"in-distribution {shown}"


def _name_points(axes: Axes, collection: Collection, runs: Sequence[Run]) -> None:
    """Write rank and lambda next to each point, inside the axes, and leave out those that would overlap."""
    middle = sum(collection.points[run.name].kept for run in runs) / len(runs)
    named: list[tuple[float, float]] = []
    for run in runs:
        one, settings = collection.points[run.name], run.settings
        text = " ".join(
            part
            for part in (
                f"r{settings.rank}" if settings.rank is not None else "",
                f"λ{settings.lam:g}" if settings.lam is not None else "",
            )
            if part
        )
        place = 100 * one.kept, 100 * one.id
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(place))
        if not text or any(abs(x - there) < 0.15 and abs(y - height) < 0.05 for there, height in named):
            continue
        named.append((x, y))
        left = one.kept > middle
        axes.annotate(text, place, xytext=(-8 if left else 8, 5), textcoords="offset points",
                      fontsize=8, ha="right" if left else "left")  # fmt: skip


def training(collection: Collection, *, narrow: bool) -> Figure:
    """Draw over the steps the loss, the share of open blocks, and the distance to the untouched model."""
    runs = [run for run in collection.runs if run.history.get("train/loss")]
    if not runs:
        raise NoData("no run has recorded a loss yet")
    kind = "cross entropy" if collection.classifies else "contrastive loss"
    penalty = " + penalty" if any(run.history.get("adapter/active_share") for run in runs) else ""
    curves = [
        ("train/loss", 1, "loss", f"{kind}{penalty} (nats)"),
        ("adapter/active_share", 100, "gates closing", "active blocks (% of all blocks)"),
        (f"{PREFIX}image", 1, "drift, images", "1 − cosine, held-out reference images"),
        (f"{PREFIX}text", 1, "drift, texts", "1 − cosine, held-out reference texts"),
    ]
    drawn = [curve for curve in curves if any(run.history.get(curve[0]) for run in runs)]
    figure, axes = panels("Training", len(drawn), narrow=narrow, height=3.4, columns=2)
    for (metric, scale, title, unit), one in zip(drawn, axes, strict=True):
        _curves(one, collection, runs, metric, scale)
        one.set_title(title, loc="left")
        one.set_xlabel("optimizer step")
        one.set_ylabel(unit)
        if scale == 100:
            one.set_ylim(0, 105)
    legend(figure, axes)
    return figure


def _curves(axes: Axes, collection: Collection, runs: Sequence[Run], metric: str, scale: float) -> None:
    """Draw a metric of each run that has it over the steps; the chosen run is thick."""
    found, labelled = looks(collection), set[RunLook]()
    for run in (run for run in runs if run.history.get(metric)):
        look = found[run.name]
        chosen = collection.chosen is not None and run.name == collection.chosen.name
        steps, values = zip(*run.history[metric], strict=True)
        axes.plot(steps, [scale * value for value in values], color=look.colour, linewidth=2.4 if chosen else 1.2,
                  label=None if look in labelled else look.label)  # fmt: skip
        labelled.add(look)


def scores(collection: Collection, *, narrow: bool) -> Figure:
    """Draw every gate's score over the steps of one run, by tower, with the threshold below which a gate closes."""
    if len(collection.runs) != 1:
        raise NoData("drawn in the report of a single run")
    run = collection.runs[0]
    found = {key.removeprefix("gate/"): series for key, series in run.history.items() if key.startswith("gate/")}
    towers = [tower for tower in ("image", "text") if any(name.startswith(tower) for name in found)]
    if not towers:
        raise NoData("no gate was recorded")
    figure, axes = panels("Scores of the gates", len(towers), narrow=narrow, height=3.4)
    threshold = float(run.config["gate.threshold"])
    for tower, one in zip(towers, axes, strict=True):
        labelled: set[bool] = set()
        for name, series in found.items():
            if name.startswith(tower):
                steps, values = zip(*series, strict=True)
                is_open = values[-1] >= threshold
                label = None if is_open in labelled else ("open at the end" if is_open else "closed at the end")
                labelled.add(is_open)
                one.plot(steps, values, color=CYCLE[0] if is_open else GREY, linewidth=1.1 if is_open else 0.6,
                         zorder=3 if is_open else 2, label=label)  # fmt: skip
        one.axhline(threshold, color=ORANGE, linestyle="--", linewidth=1.3, label="threshold τ")
        one.set_title(f"{tower} tower", loc="left")
        one.set_xlabel("optimizer step")
        one.set_ylabel("score of a gate")
    legend(figure, axes)
    return figure


def strength(collection: Collection, *, narrow: bool) -> Figure:
    """Draw each group against in-distribution accuracy while α rises from 0 (untouched) to 1 (fine-tuned)."""
    runs = [run for run in collection.runs if run.strength][:MOST_NAMED]
    curves, found = {run.name: _curve(run) for run in runs}, looks(collection)
    names = [name for name in GROUPS if name != "id" and any(name in curve for curve in curves.values())]
    if not names:
        raise NoData("no run was evaluated at several strengths")
    figure, axes = panels("Strength: from the untouched model (α 0) to the fine-tuned one (α 1)", len(names),
                          narrow=narrow, columns=3)  # fmt: skip
    for name, one in zip(names, axes, strict=True):
        for run in runs:
            curve = curves[run.name]
            if name in curve and "id" in curve:
                colour = found[run.name].colour
                one.plot(curve["id"], curve[name], color=colour, marker="o", markersize=3.5, label=run.label)
                for end, alpha in ((0, "α 0"), (-1, "α 1")):
                    one.annotate(alpha, (curve["id"][end], curve[name][end]), xytext=(5, 4),
                                 textcoords="offset points", fontsize=8)  # fmt: skip
        one.set_title(GROUPS[name], loc="left")
        one.set_xlabel(_learned(collection))
        one.set_ylabel(measure(name, classifies=collection.classifies))
        one.margins(0.12)
    legend(figure, axes)
    return figure


def _curve(run: Run) -> dict[str, list[float]]:
    """{group: percent at each alpha, in ascending order of alpha}."""
    content = run.strength or {}
    by_alpha = sorted(((float(alpha), means) for alpha, means in content["groups"].items()), key=lambda pair: pair[0])
    names = by_alpha[0][1] if by_alpha else {}
    return {name: [100 * means[name] for _, means in by_alpha] for name in names}
