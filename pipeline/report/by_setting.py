"""Figures over the settings of a sweep: accuracy by rank, trade-off of lambda, active blocks, cost against gain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING

from pipeline.report.costs import RunCost
from pipeline.report.records import Collection, Run
from pipeline.report.series import Family, Spread, families
from pipeline.report.style import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    GROUPS,
    MARKERS,
    PURPLE,
    VERMILION,
    NoData,
    legend,
    measure,
    own_legends,
    panels,
    rank_axis,
    reference,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOK = {"lora": (BLUE, "o"), "dora": (VERMILION, "s")}


def by_rank(collection: Collection, *, narrow: bool) -> Figure:
    """Draw the accuracy of the groups over rank, with and without gates (Figures 3 and 6 of the paper)."""
    lines = families(run for run in collection.runs if run.summary is not None)
    ranks = sorted({rank for family in lines for rank in family.ranks})
    if len(ranks) < 2:
        raise NoData("needs results at two ranks or more")
    figure, axes = _group_panels("Accuracy by rank, with and without gates", collection, narrow=narrow)
    for group, one in axes.items():
        for family, colour, marker in _looks(lines):
            lam = family.main_lam()
            points = family.by_rank(lam, partial(_group, group))
            _line(one, points, _at_lam(family), colour, family.gated, marker)
        rank_axis(one, ranks)
        _references(one, collection, group)
    legend(figure, list(axes.values()))
    return figure


def by_lam(collection: Collection, *, narrow: bool) -> Figure:
    """Draw the groups over lambda, a line per rank, with the same rank without gates at the left end (Figure 7)."""
    lines = [family for family in families(collection.runs) if family.gated and len(_evaluated_lams(family)) > 1]
    if not lines:
        raise NoData("needs a gated method with results at two values of gate.lam or more")
    plain = {family.kind: family for family in families(collection.runs) if not family.gated}
    figure, axes = _group_panels("The trade-off of λ", collection, narrow=narrow)
    for group, one in axes.items():
        value = partial(_group, group)
        lams = sorted({lam for family in lines for lam in _evaluated_lams(family)})
        drawn = [(family, rank) for family in lines for rank in family.ranks if family.by_lam(rank, value)]
        for number, (family, rank) in enumerate(drawn):
            points = {1.0 + lams.index(lam): spread for lam, spread in family.by_lam(rank, value).items()}
            ungated = plain[family.kind].by_rank(None, value).get(rank) if family.kind in plain else None
            label = f"{family.label}, rank {rank}"
            _line(one, points, label, CYCLE[number % len(CYCLE)], True, MARKERS[number % len(MARKERS)])
            if ungated is not None:
                one.plot([0.0], [100 * ungated.mean], linestyle="none", marker=MARKERS[number % len(MARKERS)],
                         markerfacecolor="none", color=CYCLE[number % len(CYCLE)])  # fmt: skip
        one.set_xticks(range(len(lams) + 1), ["no\ngates", *(f"{lam:g}" for lam in lams)])
        one.set_xlim(-0.4, len(lams) + 0.4)
        one.set_xlabel("λ, weight of the gates' penalty")
        _references(one, collection, group)
    legend(figure, list(axes.values()))
    return figure


def active_blocks(collection: Collection, *, narrow: bool) -> Figure:
    """Draw the share of open blocks over lambda, a line per rank, and over rank, a line per lambda (Figure 8)."""
    lines = [family for family in families(run for run in collection.runs if run.gates) if family.gated]
    settings = {point for family in lines for point in family.points}
    if len(settings) < 2:
        raise NoData("needs gated runs at two values of gate.lam or of adapter.rank")
    lams, ranks = sorted({lam for _, lam in settings if lam is not None}), sorted({rank for rank, _ in settings})
    views = [view for view, values in ((_over_lam, lams), (_over_rank, ranks)) if len(values) > 1]
    figure, axes = panels("Blocks that stay active", len(views), narrow=narrow, height=3.2)
    for view, one in zip(views, axes, strict=True):
        view(one, lines)
        one.set_ylabel("active blocks (% of all blocks)")
        one.set_ylim(bottom=0)
        one.margins(x=0.08)
    own_legends(figure, axes, narrow=narrow)
    return figure


def _over_lam(axes: Axes, lines: Sequence[Family]) -> None:
    lams = sorted({lam for family in lines for lam in family.lams})
    for number, (family, rank) in enumerate((each, rank) for each in lines for rank in each.ranks):
        points = {float(lams.index(lam)): spread for lam, spread in family.by_lam(rank, _active).items()}
        _line(axes, points, f"{family.label}, rank {rank}", *_look(number))
    axes.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
    axes.set_xlabel("λ, weight of the gates' penalty")
    axes.set_title("over λ", loc="left")


def _over_rank(axes: Axes, lines: Sequence[Family]) -> None:
    for number, (family, lam) in enumerate((each, lam) for each in lines for lam in each.lams):
        _line(axes, family.by_rank(lam, _active), f"{family.label}, λ {lam:g}", *_look(number))
    rank_axis(axes, sorted({rank for family in lines for rank in family.ranks}))
    axes.set_title("over rank", loc="left")


def _look(number: int) -> tuple[str, bool, str]:
    """Colour, solid line and marker of the line with this number."""
    return CYCLE[number % len(CYCLE)], True, MARKERS[number % len(MARKERS)]


def cost_and_gain(collection: Collection, costs: Mapping[str, RunCost], *, narrow: bool) -> Figure:
    """Draw the cost of unmerged blocks in a forward pass over rank, and the mean accuracy against it (Figure 9).

    costs: {run name: cost}, for runs with a cost.
    """
    runs = [run for run in collection.runs if run.name in costs and run.summary is not None]
    lines = families(runs)
    if sum(len(family.points) for family in lines) < 2:
        raise NoData("needs two evaluated adapters or more whose model can be built here")
    ranks = sorted({rank for family in lines for rank in family.ranks})
    by_gain = partial(_gain_by_cost, classifies=collection.classifies)
    views = [partial(_cost_by_rank, ranks=ranks), by_gain] if len(ranks) > 1 else [by_gain]
    figure, axes = panels("Cost of unmerged blocks, and their gain", len(views), narrow=narrow, height=3.3)
    gmac = "GMAC of one image" if collection.classifies else "GMAC of one image and one text"
    for view, one in zip(views, axes, strict=True):
        view(one, lines, costs, gmac)
        one.margins(x=0.08, y=0.12)
    own_legends(figure, axes, narrow=narrow)
    return figure


def _cost_by_rank(
    axes: Axes, lines: Sequence[Family], costs: Mapping[str, RunCost], gmac: str, *, ranks: Sequence[int]
) -> None:
    for family, colour, marker in _looks(lines):
        # _line draws shares as percent
        points = family.by_rank(family.main_lam(), lambda run: costs[run.name].unmerged / 100)
        _line(axes, points, _at_lam(family), colour, family.gated, marker)
    merged = {cost.merged for cost in costs.values()}
    if len(merged) == 1:
        axes.axhline(merged.pop(), color=GREY, linestyle=":", linewidth=1.3, label="merged, or untouched")
    rank_axis(axes, ranks)
    axes.set_ylabel(gmac)
    axes.set_title("cost by rank", loc="left")


def _gain_by_cost(
    axes: Axes, lines: Sequence[Family], costs: Mapping[str, RunCost], gmac: str, *, classifies: bool
) -> None:
    for family, colour, marker in _looks(lines):
        members = [run for each in family.points.values() for run in each]
        points = [
            (costs[run.name].unmerged, 100 * change) for run in members if (change := mean_change(run)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", marker=marker, color=colour, label=family.label,
                      markerfacecolor=colour if family.gated else "none")  # fmt: skip
    if not classifies:  # an untouched ViT can only guess and would be far below
        axes.axhline(0, color=GREY, linestyle=":", linewidth=1.3, label="untouched model")
    axes.set_xlabel(gmac)
    axes.set_ylabel("mean gain (points)" if classifies else "mean change (points)")
    axes.set_title("mean of the groups against cost", loc="left")


def mean_change(run: Run) -> float | None:
    """Mean change of id, shift and zero-shot against the untouched model: the paper's relative gain counts these.

    For a ViT it is the mean of its classifier's gain over guessing and of the source set's change.
    """
    groups = {} if run.summary is None else run.summary["groups"]
    if run.settings.classifies:
        changes = [run.point.gain if run.point else None, groups.get("source", {}).get("change")]
    else:
        changes = [groups[name]["change"] for name in ("id", "shift", "zero-shot") if name in groups]
    return None if not changes or None in changes else mean(changes)


def _looks(lines: Sequence[Family]) -> list[tuple[Family, str, str]]:
    """Colour and marker of each family: one per kind, LoRA and DoRA, or one per variant where a kind has several."""
    if len({(family.kind, family.gated) for family in lines}) == len(lines):
        return [(family, *_LOOK[family.kind]) for family in lines]
    return [(family, CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)]) for i, family in enumerate(lines)]


def _at_lam(family: Family) -> str:
    lam = family.main_lam()
    return family.label if lam is None else f"{family.label}, λ {lam:g}"


def _group(name: str, run: Run) -> float | None:
    return run.group(name)


def _active(run: Run) -> float | None:
    return run.active_share


def _evaluated_lams(family: Family) -> set[float]:
    return {
        lam
        for (_, lam), runs in family.points.items()
        if lam is not None and any(run.summary is not None for run in runs)
    }


def _group_panels(title: str, collection: Collection, *, narrow: bool) -> tuple[Figure, dict[str, Axes]]:
    """Draw a panel for each group that has results."""
    present = [name for name in GROUPS if any(run.group(name) is not None for run in collection.runs)]
    if not present:
        raise NoData("needs the results of an evaluation")
    figure, axes = panels(title, len(present), narrow=narrow)
    for name, one in zip(present, axes, strict=True):
        one.set_title(GROUPS[name], loc="left")
        one.set_ylabel(measure(name, classifies=collection.classifies))
    return figure, dict(zip(present, axes, strict=True))


def _references(axes: Axes, collection: Collection, group: str) -> None:
    reference(axes, collection.untouched.get(group), "untouched model")
    for method, colour, style in (("full fine-tuning", GREEN, "--"), ("linear classifier", PURPLE, "-.")):
        values = [run.group(group) for run in collection.runs if run.settings.method == method]
        known = [value for value in values if value is not None]
        reference(axes, mean(known) if known else None, method, colour, style)


def _line(
    axes: Axes, points: Mapping[int, Spread] | Mapping[float, Spread], label: str, colour: str, gated: bool,
    marker: str = "o",
) -> None:  # fmt: skip
    """Draw values in percent over x: solid with gates, dashed without, with bars from lowest to highest seed."""
    if not points:
        return
    x: Sequence[float] = list(points)
    means = [100 * each.mean for each in points.values()]
    reach: Callable[[Spread], tuple[float, float]] = lambda each: (each.mean - each.low, each.high - each.mean)  # noqa: E731
    bars = [[100 * reach(each)[side] for each in points.values()] for side in (0, 1)]
    axes.errorbar(x, means, yerr=bars if any(map(any, bars)) else None, label=label, color=colour, marker=marker,
                  linestyle="-" if gated else "--", markerfacecolor=colour if gated else "none", capsize=2)  # fmt: skip
