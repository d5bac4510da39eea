"""`selora report`: read the runs, draw figures, make tables, write the page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.config import Config, ConfigError
from pipeline.files import replace_bytes
from pipeline.report import block_map, by_run, by_setting, directories, stored
from pipeline.report.costs import run_costs
from pipeline.report.page import Drawing, render
from pipeline.report.records import Collection
from pipeline.report.style import NoData, retitle, styled
from pipeline.report.table import Table
from pipeline.report.tables import tables
from pipeline.tracking.tracker import open_tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENT = "mlflow:"
PAGE = "report.html"
_PNG_DPI = 160


class Draw(Protocol):
    """Draws one figure of the report; raises NoData if the runs have no data for it."""

    def __call__(self, collection: Collection, *, narrow: bool) -> Figure: ...


@dataclass(frozen=True)
class Entry:
    """A figure: file name, title to show if it cannot be drawn, caption, and the function that draws it."""

    key: str
    title: str
    caption: str
    draw: Draw


def _catalogue(collection: Collection) -> tuple[Entry, ...]:
    costs = run_costs(collection)
    gain = "mean change of in-distribution, shift and zero-shot"
    if collection.classifies:
        gain = "mean of the classifier's gain over guessing and of the change of K-NN on the source set"
    return (
        Entry("pareto", "Learned against kept", "Up and to the right is better. The grey line connects the models "
              "that no other model beats in both; thin lines are strength curves, from the untouched model to the run.",
              by_run.pareto),
        Entry("groups", "Accuracy by group", "Dotted: the accuracy of guessing.", by_run.groups),
        Entry("rank", "Accuracy by rank", "Solid with gates, dashed without. Bars reach from the lowest to the highest "
              "seed where there are several.", by_setting.by_rank),
        Entry("lambda", "Trade-off of λ", "Open marks at the left: the same rank without gates.", by_setting.by_lam),
        Entry("active", "Active blocks over λ and rank", "A larger λ closes more gates.", by_setting.active_blocks),
        Entry("cost", "Cost against gain", "Multiply-accumulates of one forward pass while blocks are not merged; "
              f"a merged model costs as much as the untouched one. Gain: {gain}.",
              partial(by_setting.cost_and_gain, costs=costs)),
        Entry("map", "Where blocks stay active", "Layers are counted from the input.", block_map.activation),
        Entry("budget", "How the budget was spent", "The darker a cell, the longer its block was open; full: to the "
              "end. Usefulness: running mean of minus the gradient of the loss with respect to the block's indicator, "
              "when the set was fixed.", block_map.dropping),
        Entry("drift", "Drift against kept", "Drift: distance to the untouched model on reference samples that are not "
              "trained on, at the end of the run; a limit (max_drift) stops a trial that passes it.", by_run.drift),
        Entry("training", "Training curves", "The chosen model's line is thick.", by_run.training),
        Entry("scores", "Scores of the gates", "A gate is open while its score is at or above the threshold.",
              by_run.scores),
        Entry("strength", "Strength curve", "Weights between the untouched model (α 0) and the fine-tuned one (α 1).",
              by_run.strength),
    )  # fmt: skip


def report(target: Path | str, out: Path | None = None, uri: str | None = None) -> Path:
    """Write report.html, tables/*.csv and figures/*.png|svg; returns the page's path.

    target: directory of a run, of a sweep or of runs, or "mlflow:EXPERIMENT" (at `uri`, else in the default store).
    out: default TARGET/report, for an experiment report/EXPERIMENT. Files are replaced atomically, so an open page is
    never incomplete. ConfigError if there is nothing to report on.
    """
    text = str(target)
    if text.startswith(EXPERIMENT):
        name = text.removeprefix(EXPERIMENT)
        collection, folder = stored.collect(name, uri), stored.default_folder(name)
    elif uri is not None:
        raise ConfigError(f"uri: only an experiment is read from a server; write {EXPERIMENT}EXPERIMENT, not {text}")
    else:
        collection, folder = directories.collect(Path(target)), Path(target) / "report"
    folder = folder if out is None else out
    return write(collection, folder)


def report_sweep(sweep_dir: Path, config: Config) -> Path:
    """Write the report of a finished sweep and upload it to its run in MLflow; `config` is that of the sweep."""
    page = report(sweep_dir)
    with open_tracker(
        sweep_dir,
        run_name=config.name,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        enabled=config.tracking.enabled,
        owns_status=False,
    ) as tracker:
        for made in (page, page.parent / "figures", page.parent / "tables"):
            tracker.artifact(made, "report")
    return page


def write(collection: Collection, out: Path) -> Path:
    """Write all files of the report of these runs to `out`."""
    made = tables(collection)
    for table in made:
        _replace(out / "tables" / f"{table.key}.csv", table.csv().encode())
    drawings, absent = _draw_all(collection, out / "figures")
    _drop_old(out, made, drawings)
    page = render(collection, made, drawings, absent, datetime.now())
    _replace(out / PAGE, page.encode())
    return out / PAGE


def _draw_all(collection: Collection, folder: Path) -> tuple[list[Drawing], dict[str, str]]:
    drawings, absent = [], {}
    for part in collection.parts:
        for entry in _catalogue(part):
            entry = entry if part is collection else _of_part(entry, part.title)
            try:
                drawings.append(_drawn(entry, part, folder))
            except NoData as reason:
                absent[entry.title] = str(reason)
    return drawings, absent


def _of_part(entry: Entry, title: str) -> Entry:
    """The figure of one target set, with its name in the title."""

    def draw(collection: Collection, *, narrow: bool) -> Figure:
        figure = entry.draw(collection, narrow=narrow)
        retitle(figure, lambda text: f"{title}: {text}")
        return figure

    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", title)
    return Entry(f"{entry.key}-{slug}", f"{title}: {entry.title}", entry.caption, draw)


def _drawn(entry: Entry, collection: Collection, folder: Path) -> Drawing:
    with styled(entry.key):
        wide, narrow = entry.draw(collection, narrow=False), entry.draw(collection, narrow=True)
        svg = _saved(wide, "svg")
        wide.set_layout_engine("none")  # computed for the first file; computing it again would cost as much
        _replace(folder / f"{entry.key}.svg", svg)
        _replace(folder / f"{entry.key}.png", _saved(wide, "png"))
        phone = _saved(narrow, "svg").decode()
        return Drawing(entry.key, entry.title, entry.caption, svg.decode(), phone)


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date, equal runs give equal files.
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=_PNG_DPI, metadata=metadata)
    return buffer.getvalue()


def _drop_old(out: Path, made: list[Table], drawings: list[Drawing]) -> None:
    """Remove files of an earlier report that this one does not write, which could be mistaken for its own."""
    keys = {table.key for table in made} | {drawing.key for drawing in drawings}
    for pattern in ("tables/*.csv", "figures/*.svg", "figures/*.png"):
        for path in out.glob(pattern):
            if path.stem not in keys:
                path.unlink()


def _replace(path: Path, content: bytes) -> None:
    try:
        replace_bytes(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
