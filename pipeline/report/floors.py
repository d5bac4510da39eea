"""The report's headline: what each method reaches in-distribution while it keeps 99, 95 or 90 %."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from pipeline.report.records import Collection, Run
from pipeline.report.series import configurations, labels
from pipeline.report.table import Kind, Table, percent
from pipeline.selection.frontier import FLOORS, id_at


def at_floors(collection: Collection) -> Table | None:
    """A row for each configuration with a strength curve, seeds of one together; None where no run has a curve."""
    runs = [run for run in collection.runs if run.curve]
    if not runs:
        return None
    named = labels(runs)
    head = (
        ("", ("method", "rank", "λ", "seeds")),
        ("in-distribution (%) at kept", tuple(f"≥ {100 * floor:g} %" for floor in FLOORS)),
    )
    rows, kinds = [], list[Kind]()
    if "id" in collection.untouched:
        rows.append(["untouched model", "", "", "", *[percent(collection.untouched["id"])] * len(FLOORS)])
        kinds.append("reference")
    for same in configurations(runs):
        settings = same[0].settings
        rows.append(
            [
                named[same[0].name],
                "" if settings.rank is None else str(settings.rank),
                "" if settings.lam is None else f"{settings.lam:g}",
                str(len(same)),
                *(_over_seeds(same, floor) for floor in FLOORS),
            ]
        )
        kinds.append("run")
    notes = [
        "In-distribution accuracy at the largest strength α, with weights W0 + α (W1 - W0), that keeps the share: read "
        "off the run's strength curve, with straight lines between its points, on the images that are reported."
    ]
    if any(len(same) > 1 for same in configurations(runs)):
        notes.append("Several seeds: the mean, and in brackets the range from the lowest to the highest seed.")
    return Table("floors", "Accuracy at a share kept", head, rows, kinds, notes)


def _over_seeds(same: Sequence[Run], floor: float) -> str:
    values = [value for run in same if (value := id_at(run.curve, floor)) is not None]
    if len(values) < 2:
        return percent(values[0])
    return f"{percent(mean(values))} ({percent(min(values))} to {percent(max(values))})"
