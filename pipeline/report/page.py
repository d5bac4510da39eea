"""The page: one HTML file that contains its style, tables and drawings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files

from pipeline.report.records import RUNNING, Collection, Run
from pipeline.report.style import CYCLE, GRID, INK, ON_DARK, PAPER
from pipeline.report.table import Table, percent
from pipeline.report.tables import state
from pipeline.selection.ranking import point_of

# marker colour of the drawings -> CSS variable
_VARIABLES = {INK: "--ink", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate((*CYCLE, *(set(ON_DARK) - {INK, GRID, PAPER, *CYCLE})))
}


@dataclass(frozen=True)
class Drawing:
    """One figure: SVG texts for a wide screen and for a phone, and its caption."""

    key: str
    title: str
    caption: str
    wide: str
    narrow: str


def render(
    collection: Collection,
    tables: Sequence[Table],
    drawings: Sequence[Drawing],
    absent: Mapping[str, str],
    when: datetime,
) -> str:
    """The page as HTML. `absent`: {title of a figure that could not be drawn: reason}."""
    from jinja2 import Environment, StrictUndefined

    template = files("pipeline.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    light = {variable: colour for colour, variable in _VARIABLES.items()}
    dark = {variable: ON_DARK[colour] for colour, variable in _VARIABLES.items()}
    return environment.from_string(template).render(
        collection=collection,
        facts=_facts(collection, when),
        troubles=[(run.label, state(run)) for run in collection.runs if run.status in ("failed", "stopped")],
        waiting=[(run.label, state(run)) for run in collection.runs if run.status in RUNNING],
        unmeasured=[run.label for run in collection.runs if run.status == "trained"],
        tables=tables,
        drawings=[(drawing, _inline(drawing.wide, drawing.key), _inline(drawing.narrow, drawing.key + "-n"))
                  for drawing in drawings],
        absent=absent,
        light=light,
        dark=dark,
    )  # fmt: skip


def _facts(collection: Collection, when: datetime) -> list[tuple[str, str]]:
    """The top of the page: counts, the untouched model, the chosen one."""
    counts = Counter(run.status for run in collection.runs)
    counted = ", ".join(f"{number} {status}" for status, number in counts.most_common())
    facts = [("source", collection.source), ("runs", f"{len(collection.runs)} ({counted})")]
    facts += [("benchmark", collection.benchmark)] if collection.benchmark else []
    for part in collection.parts:
        chosen = part.chosen
        if chosen is not None and chosen.point is not None:
            facts.append(("chosen" if part is collection else f"chosen, {part.title}", _chosen(part, chosen)))
    return [*facts, ("written", when.strftime("%Y-%m-%d %H:%M"))]


def _chosen(part: Collection, run: Run) -> str:
    """Gain and share kept of the chosen model, at the strength that keeps the floor if there is one."""
    at = None if part.floor is None else run.floors.get(part.floor)
    one = run.point if at is None or run.at_floor is None else point_of(run.at_floor)
    if one is None:
        return run.label
    over, strength = " over guessing" if part.classifies else "", "" if at is None else f" at strength {at.alpha:g}"
    return (
        f"{run.label}{strength}: in-distribution {percent(one.id)} % ({100 * one.gain:+.1f} points{over}), "
        f"kept {percent(one.kept)} %, least of {one.worst}: {percent(one.worst_kept)} %"
    )


def _inline(svg: str, prefix: str) -> str:
    """A drawing for a page with several drawings: without prologue, with unique ids, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # The page may shrink a drawing but not enlarge it, so that text has one size; the viewBox keeps the shape.
    svg = re.sub(r'(<svg[^>]*?) width="([^"]*)"', r'\1 style="max-width: \2"', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(rf"((?:fill|stroke): ?){colour}", rf"\1var({variable})", svg, flags=re.IGNORECASE)
    return svg
