"""Progress of a sweep, read from its trials' files: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.display import duration, rich_table, text_table
from pipeline.runs.results import EVAL, has_summary, read_floors, read_summary
from pipeline.runs.sweep import OVER, TrialState, is_sweep, read_state, trial_dir
from pipeline.selection.drift import largest_drift, learned_limit
from pipeline.selection.frontier import FLOORS, floors_of
from pipeline.selection.ranking import point_of
from pipeline.selection.standings import standings
from pipeline.tracking.journal import JOURNAL, decode, tail
from pipeline.tuning.plan import Speed
from pipeline.tuning.trials import Trial

if TYPE_CHECKING:
    from rich.table import Table

HEAD = ("trial", "state", "step", "loss", "active", "id", "forgot", "left")
_FORGOT = HEAD.index("forgot")
_TAIL_BYTES = 256 * 1024  # bytes; a record of all gates of a big model has a few kB
_TABLE_SECONDS, _LINE_SECONDS = 1.0, 5.0


@dataclass(frozen=True)
class TrialProgress:
    """One trial. Accuracies in [0, 1], `forgot` in points of accuracy / 100, seconds left of training.

    Attributes:
        floors: {share kept: id at the largest strength that keeps it}, for the columns of a sweep with a floor.
    """

    name: str
    state: TrialState
    step: int
    loss: float | None
    active: str
    id: float | None
    forgot: float | None
    seconds_left: float | None
    floors: Mapping[float, float | None] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """The texts under `head`."""
        at_floors = tuple("" if value is None else f"{100 * value:.1f}" for value in self.floors.values())
        return (
            self.name,
            self.state.status,
            f"{self.step}/{self.state.total_steps}",
            "" if self.loss is None else f"{self.loss:.4f}",
            self.active,
            "" if self.id is None else f"{100 * self.id:.1f}",
            "" if self.forgot is None else f"{100 * self.forgot:.1f}",
            *at_floors,
            "" if self.seconds_left is None else duration(self.seconds_left),
        )


def head(floor: float | None) -> tuple[str, ...]:
    """The names of the columns; a sweep with a floor also has id at its floor, marked, and at the report's floors."""
    at = [f"id@{100 * each:g}{'*' if each == floor else ''}" for each in _columns(floor)]
    return (*HEAD[: _FORGOT + 1], *at, *HEAD[_FORGOT + 1 :])


class Progress:
    """Shows the progress of the trials while a block runs."""

    def __init__(self, sweep_dir: Path, trials: Sequence[Trial], floor: float | None = None) -> None:
        self._dir, self._trials, self._floor = sweep_dir, trials, floor
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if sys.stderr.isatty():
            self._show_table()
        else:
            self._show_lines()

    def _show_table(self) -> None:
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
            while True:
                live.update(live_table(rows(self._dir, self._trials, self._floor), self._floor), refresh=True)
                if self._over.wait(_TABLE_SECONDS):
                    return

    def _show_lines(self) -> None:
        """Print a line when a trial's state changes or its journal grows, at most one per trial in some seconds."""
        printed: dict[str, tuple[str, ...]] = {}
        while True:
            over = self._over.wait(_LINE_SECONDS)
            for row in rows(self._dir, self._trials, self._floor):
                cells = row.cells()
                if cells[:3] != printed.get(row.name) and (row.state.status != "waiting" or row.step):
                    printed[row.name] = cells[:3]
                    sys.stderr.write(line_of(row, self._floor) + "\n")
            sys.stderr.flush()
            if over:
                return


def rows(sweep_dir: Path, trials: Sequence[Trial], floor: float | None = None) -> list[TrialProgress]:
    """The progress of every trial."""
    return [_row(trial_dir(sweep_dir, trial.name), trial, floor) for trial in trials]


def line_of(row: TrialProgress, floor: float | None = None) -> str:
    """ "lora_r16: training 40/100, loss 3.21, active 12/144, 0:35 left"."""
    cells = dict(zip(head(floor), row.cells(), strict=True))
    parts = [f"{row.name}: {cells['state']} {cells['step']}"]
    parts += [f"{name} {cells[name]}" for name in list(cells)[3:-1] if cells[name]]
    parts += [f"{cells['left']} left"] if cells["left"] else []
    parts += [row.state.error.splitlines()[0]] if row.state.error else []
    return ", ".join(parts)


def live_table(found: Sequence[TrialProgress], floor: float | None = None) -> Table:
    """The table that a terminal shows while the sweep runs."""
    over = sum(row.state.status in OVER for row in found)
    styles = {"training": "bold", "evaluating": "bold", "failed": "red", "stopped": "dim", "finished": "green"}
    return rich_table(
        head(floor),
        [row.cells() for row in found],
        left=2,
        styles=[styles.get(row.state.status, "") for row in found],
        title=f"{over} of {len(found)} trials over",
    )


def describe(sweep_dir: Path, trials: Sequence[Trial], floor: float | None = None) -> str:
    """The final table as plain text, with the reason below every trial that did not finish."""
    found = rows(sweep_dir, trials, floor)
    table = text_table(head(floor)[:-1], [row.cells()[:-1] for row in found], left=2)
    reasons = [f"{row.name} {row.state.status}: {row.state.error}" for row in found if row.state.error]
    stand = standings(sweep_dir) if is_sweep(sweep_dir) else ""
    return "\n".join([table, *reasons, *(["", stand] if stand else [])])


def measured_speed(sweep_dir: Path, trials: Sequence[Trial]) -> Speed | None:
    """Seconds per step measured by the trials of this sweep; None before the first record."""
    found = []
    for trial in trials:
        _, values = last_values(trial_dir(sweep_dir, trial.name))
        if values.get("train/images_per_s"):
            found.append(trial.config.train.global_batch_size / values["train/images_per_s"])
    if not found:
        return None
    return Speed(statistics.median(found), f"median of {len(found)} trial{'s' if len(found) > 1 else ''} of this sweep")


def learned_drift(sweep_dir: Path, trials: Sequence[Trial], floor: float) -> float | None:
    """The largest drift of a finished trial that kept the floor at full strength; None if none did."""
    pairs = []
    for run_dir in (trial_dir(sweep_dir, trial.name) for trial in trials):
        drift = largest_drift(last_values(run_dir)[1])
        point = point_of(read_summary(run_dir / EVAL)) if has_summary(run_dir / EVAL) else None
        pairs += [(drift, point.kept)] if drift is not None and point is not None else []
    return learned_limit(pairs, floor)


def last_values(run_dir: Path) -> tuple[int, dict[str, float]]:
    """(newest step of training, latest value of each metric) from the end of a run's journal."""
    step, values = 0, {}
    path = run_dir / JOURNAL
    for record in tail(path, _TAIL_BYTES) if path.is_file() else ():
        if record.kind == "metrics" and "train/loss" in record.data["values"]:
            step = record.data["step"]
            values |= {name: decode(value) for name, value in record.data["values"].items()}
    return step, values


def _row(run_dir: Path, trial: Trial, floor: float | None) -> TrialProgress:
    state = read_state(run_dir)
    step, values = last_values(run_dir)
    groups, forgot = _results(run_dir / EVAL)
    speed = values.get("train/images_per_s")
    left = None
    if state.status == "training" and speed:
        left = (state.total_steps - step) * trial.config.train.global_batch_size / speed
    return TrialProgress(
        name=trial.name,
        state=state,
        step=max(step, state.step),
        loss=values.get("train/loss"),
        active=_active(values),
        id=groups,
        forgot=forgot,
        seconds_left=left,
        floors=_at_floors(run_dir / EVAL, floor),
    )


def _columns(floor: float | None) -> list[float]:
    return [] if floor is None else sorted({floor, *FLOORS}, reverse=True)


def _at_floors(folder: Path, floor: float | None) -> dict[float, float | None]:
    if floor is None:
        return {}
    found = floors_of(read_floors(folder))
    return {each: found[each].id if each in found else None for each in _columns(floor)}


def _active(values: dict[str, float]) -> str:
    open_blocks, share = values.get("adapter/active_blocks"), values.get("adapter/active_share")
    if open_blocks is None or share is None:
        return ""
    return f"{open_blocks:.0f} ({share:.0%})"


def _results(folder: Path) -> tuple[float | None, float | None]:
    """(mean of the id group, forgetting) of an evaluation; None for missing values."""
    if not has_summary(folder):
        return None, None
    summary = read_summary(folder)
    return summary["groups"].get("id", {}).get("mean"), summary["forgetting"]
