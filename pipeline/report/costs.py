"""Cost of each run's active blocks in a forward pass while they are not merged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.config import ConfigError
from pipeline.report.records import Collection, Run

_GIGA = 1e9


class RunCost(NamedTuple):
    """GMAC of a forward pass over one image, and for a CLIP one text: with the active blocks unmerged, and merged."""

    unmerged: float
    merged: float


def run_costs(collection: Collection) -> dict[str, RunCost]:
    """The cost of each evaluated adapter; runs whose model cannot be built here are left out.

    Only the architecture counts, so no weights are loaded and no hub is contacted.
    """
    costs: dict[str, RunCost] = {}
    if sum(_counts(run) for run in collection.runs) < 2:
        return costs  # a single cost has nothing to compare with, and building a model takes seconds
    by_model: dict[tuple[str, int | None], list[Run]] = {}
    for run in collection.runs:
        if _counts(run):
            by_model.setdefault((run.settings.model, run.settings.image_size), []).append(run)
    for (model, image_size), runs in by_model.items():
        if not model.startswith(("hf-hub:", "hf:", "timm:hf-hub:")):
            costs |= _of_model(model, image_size, runs)
    return costs


def _counts(run: Run) -> bool:
    return run.settings.rank is not None and bool(run.gates) and run.summary is not None


def _of_model(model: str, image_size: int | None, runs: list[Run]) -> dict[str, RunCost]:
    from pipeline.costs.cost import OWN_CONVENTION, model_cost
    from pipeline.model.load import load_model
    from pipeline.model.vit import untagged

    try:
        with _open_clip_silent():
            cost = model_cost(load_model(untagged(model), image_size=image_size))
    except ConfigError:  # the report may be written on a machine without the run's model
        return {}
    base = sum(cost.base.values())
    found = {}
    for run in runs:
        rank, convention = run.settings.rank, OWN_CONVENTION["dora" if run.settings.kind == "dora" else "lora"]
        assert rank is not None
        active = [target for target, is_open in run.gates.items() if is_open]
        unmerged = base + sum(cost.overhead(rank, convention, active).values())
        found[run.name] = RunCost(unmerged / _GIGA, base / _GIGA)
    return found


@contextmanager
def _open_clip_silent() -> Iterator[None]:
    """Hide open_clip's warning about random weights, which are intended here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
