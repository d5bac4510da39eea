"""Map of active blocks: layer x projection for each tower, summed over runs (Figures 10 and 11 of the paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.report.records import Collection, Run
from pipeline.report.style import BLUE, GRID, INK, NoData, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From bottom to top as in the paper, with its names for the three linears other than query, key and value.
PROJECTIONS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "attention out",
    "fc1": "MLP 1 (fc1)",
    "fc1_g": "MLP 1, gate",
    "fc1_x": "MLP 1, value",
    "fc2": "MLP 2 (fc2)",
}


def share_of_runs(runs: list[Run], tower: str) -> dict[tuple[int, str], float]:
    """{(layer, projection): share of the runs in which this block of the tower is active}."""
    counts: dict[tuple[int, str], int] = {}
    for run in runs:
        for target, is_open in run.gates.items():
            where, layer, projection = target.split(".")
            if where == tower:
                key = (int(layer), projection)
                counts[key] = counts.get(key, 0) + is_open
    return {key: count / len(runs) for key, count in counts.items()}


def activation(collection: Collection, *, narrow: bool) -> Figure:
    """Draw each block as a cell; the strength of its colour is the share of gated runs that keep the block."""
    runs = [run for run in collection.runs if run.settings.gated and run.gates]
    shares = {tower: share_of_runs(runs, tower) for tower in ("image", "text")} if runs else {}
    towers = [tower for tower, share in shares.items() if share]
    if not towers:
        raise NoData("needs a gated run with a checkpoint")
    counted = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    figure, axes = panels(f"Where blocks stay active ({counted} with gates)", len(towers), narrow=narrow, height=3.0)
    for tower, one in zip(towers, axes, strict=True):
        _draw(one, shares[tower], tower)
    _scale(figure, "active" if len(runs) == 1 else "of the runs", narrow=narrow, one=len(runs) == 1)
    return figure


def dropping(collection: Collection, *, narrow: bool) -> Figure:
    """Draw for one run with a budget how long each block was open, and the usefulness by which blocks were kept."""
    runs = [run for run in collection.runs if run.budget is not None]
    if not runs:
        raise NoData("needs a run with gate.budget")
    run = next((each for each in runs if each is collection.chosen), runs[0])
    assert run.budget is not None
    last = max([run.step, *run.budget["dropped_at"].values()])
    shares = {
        target: 1.0 if target in run.budget["open"] else run.budget["dropped_at"].get(target, last) / max(1, last)
        for target in run.budget["usefulness"]
    }
    towers = [tower for tower in ("image", "text") if any(target.startswith(f"{tower}.") for target in shares)]
    title = f"How the budget was spent: {run.label}"
    figure, axes = panels(title, len(towers) + 1, narrow=narrow, height=3.0)
    for tower, one in zip(towers, axes, strict=False):
        own = {
            (int(target.split(".")[1]), target.split(".")[2]): share
            for target, share in shares.items()
            if target.startswith(f"{tower}.")
        }
        _draw(one, own, tower)
        count = sum(share == 1.0 for share in own.values())
        one.set_title(f"{tower} tower: {count} of {len(own)} kept", loc="left")
    _usefulness(axes[-1], run)
    _scale(figure, "of the run open", narrow=narrow, one=False)
    return figure


def _usefulness(axes: Axes, run: Run) -> None:
    """Draw a bar for each block, the most useful first: kept ones in colour."""
    assert run.budget is not None
    ranked = sorted(run.budget["usefulness"].items(), key=lambda item: -item[1])
    kept = set(run.budget["open"])
    axes.bar(range(1, len(ranked) + 1), [value for _, value in ranked], width=1.0,
             color=[BLUE if name in kept else GRID for name, _ in ranked])  # fmt: skip
    axes.set_title("usefulness, kept blocks in colour", loc="left")
    axes.set_xlabel("blocks by usefulness")
    axes.set_ylabel("fall of the loss by the block")


def _draw(axes: Axes, shares: dict[tuple[int, str], float], tower: str) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    layers = sorted({layer for layer, _ in shares})
    rows = [name for name in PROJECTIONS if any(projection == name for _, projection in shares)]
    cells = [Rectangle((layers.index(layer) - 0.5, rows.index(name) - 0.5), 1, 1) for layer, name in shares]
    # Opacity instead of a colour map: an inactive block has the colour of the page, dark or light.
    axes.add_collection(PatchCollection(cells, facecolors=[(BLUE, share) for share in shares.values()], linewidths=0))
    axes.add_collection(PatchCollection(cells, facecolors="none", edgecolors=GRID, linewidths=0.7))
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_xticks(range(len(layers)), [str(layer + 1) for layer in layers])
    axes.set_yticks(range(len(rows)), [PROJECTIONS[name] for name in rows])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_title(f"{tower} tower: {sum(shares.values()):.1f} of {len(shares)} on average", loc="left")
    axes.set_xlabel("transformer layer")
    axes.set_ylabel("linear that carries the block")


def _scale(figure: Figure, unit: str, *, narrow: bool, one: bool) -> None:
    """The legend: five strengths of the colour, or for one run the two states."""
    from matplotlib.patches import Patch

    steps = (0.0, 1.0) if one else (0.0, 0.25, 0.5, 0.75, 1.0)
    names = ["closed", unit] if one else [f"{step:.0%}" for step in steps]
    if not one:
        names[-1] += f" {unit}"
    patches = [
        Patch(facecolor=(BLUE, step), edgecolor=INK, linewidth=0.5, label=name)
        for step, name in zip(steps, names, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=3 if narrow else len(patches))
