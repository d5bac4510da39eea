"""A sweep without Ray: its directory is written as `selora sweep` does, and a test runs the trials one by one."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.tuning import sweep
from pipeline.tuning.grid import Grid, Trial


def lay_out(config: Config, grid: Grid) -> list[Trial]:
    """Write the directory of a sweep and start nothing; return its trials."""
    trials, totals = sweep._prepare(config, grid)
    sweep._refuse_changes(sweep._directory(config), trials)
    sweep._write(sweep._directory(config), config, grid, trials, totals, retry_failed=False)
    return trials
