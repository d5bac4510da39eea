"""A sweep without Ray: its directory is written as `selora sweep` does, and a test runs the trials one by one."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.tuning.grid import Grid
from pipeline.tuning.layout import prepare, refuse_changes, sweep_directory, write_layout
from pipeline.tuning.trials import Trial


def lay_out(config: Config, grid: Grid) -> list[Trial]:
    """Write the directory of a sweep and start nothing; return its trials."""
    trials, totals = prepare(config, grid)
    refuse_changes(sweep_directory(config), trials)
    write_layout(sweep_directory(config), config, grid, trials, totals, retry_failed=False)
    return trials
