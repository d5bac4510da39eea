"""The report's headline: the in-distribution accuracy of each method while it keeps 99, 95 or 90 %."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.records import Collection, Run
from pipeline.report.series import configurations, labels
from pipeline.report.table import Kind, Table, percent
from pipeline.selection.candidates import SeedSpread
from pipeline.selection.frontier import FLOORS, id_at


def at_floors(collection: Collection) -> Table | None:
    """A row for each configuration with all its seeds; None if no run was evaluated at floors or has a curve."""
    runs = [run for run in collection.runs if run.curve or run.floors]
    if not runs:
        return None
    named = labels(runs)
    every = [(same, [run for run in same if run in runs]) for same in configurations(collection.runs)]
    groups = [(len(same), measured) for same, measured in every if measured]
    floors = sorted(set(FLOORS) | ({collection.floor} if collection.floor is not None else set()), reverse=True)
    spreads = {floor: SeedSpread.of([_values(same, floor) for _, same in groups]) for floor in floors}
    head = (
        ("", ("method", "rank", "λ", "seeds")),
        ("in-distribution (%) at kept", tuple(f"≥ {100 * floor:g} %" for floor in floors)),
    )
    rows, kinds = [], list[Kind]()
    if "id" in collection.untouched:
        rows.append(["untouched model", "", "", "", *[percent(collection.untouched["id"])] * len(floors)])
        kinds.append("reference")
    for wanted, same in groups:
        settings, taken = same[0].settings, collection.floor is not None and collection.chosen in same
        rows.append(
            [
                ("★ " if taken else "") + named[same[0].name],
                "" if settings.rank is None else str(settings.rank),
                "" if settings.lam is None else f"{settings.lam:g}",
                f"{len(same)} of {wanted}" if wanted > len(same) else str(len(same)),
                *(_shown(_values(same, floor), spreads[floor]) for floor in floors),
            ]
        )
        kinds.append("chosen" if taken else "run")
    return Table("floors", "Accuracy at a share kept", head, rows, kinds, _notes(collection, groups))


def _values(same: Sequence[Run], floor: float) -> list[float]:
    """Each run's accuracy at the strength chosen for the floor; if none was chosen, read from its curve."""
    found = (run.floors[floor].id if floor in run.floors else id_at(run.curve, floor) for run in same)
    return [value for value in found if value is not None]


def _shown(values: Sequence[float], spread: SeedSpread) -> str:
    if not values:
        return ""
    estimate = spread.estimate(values)
    return percent(estimate.mean) + ("" if estimate.half is None else f" ± {percent(estimate.half)}")


def _notes(collection: Collection, groups: Sequence[tuple[int, Sequence[Run]]]) -> list[str]:
    runs, notes = [run for _, same in groups for run in same], []
    if any(run.floors for run in runs):
        notes.append(
            "In-distribution accuracy at the largest strength α, with weights W0 + α (W1 - W0), that keeps the share: "
            "α was chosen on a fifth of the images of the other groups, and the accuracy is that of the other images."
        )
    if any(not run.floors for run in runs):
        notes.append(
            "In-distribution accuracy at the largest strength α, with weights W0 + α (W1 - W0), that keeps the share: "
            "read from the run's strength curve, with straight lines between its points, on the images of the report."
        )
    if any(len(same) > 1 for _, same in groups):
        notes.append(
            "±: 95 % t-interval of the mean over seeds; the standard deviation is pooled over all rows with several."
        )
    if collection.floor is not None and collection.taken is not None:
        equal = [run.label for run in runs if run.configuration in collection.taken.equal]
        notes.append(
            f"★ taken: the most at kept ≥ {100 * collection.floor:g} %"
            + (f"; not separated by the intervals, and not cheaper: {', '.join(equal)}." if equal else ".")
        )
    return notes
