"""A sweep before its trials start: everything is checked, and its directory is created or continued."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError, load_config, override
from pipeline.data.order import stable_hash
from pipeline.runs.results import EVAL, read_floors
from pipeline.runs.run import CONFIG_FILE, write_config
from pipeline.runs.sweep import (
    OVER,
    STOP_FILE,
    finished_of,
    is_sweep,
    read_alarm,
    read_soup,
    read_state,
    read_sweep,
    trial_dir,
    write_soup,
    write_state,
    write_sweep,
)
from pipeline.selection.frontier import floors_of
from pipeline.tuning.grid import Grid
from pipeline.tuning.plan import trained_parameters
from pipeline.tuning.search import ATTEMPTS, Tried, check_draws, configs_at_ends, option, propose, value_of
from pipeline.tuning.trials import Expansion, GridPoint, Trial, expand, keep_names, points_of, proposed_points

if TYPE_CHECKING:
    from pipeline.evaluation.datasets.benchmark import Benchmark


def sweep_directory(config: Config) -> Path:
    """Directory of a config's sweep."""
    return Path(config.out).absolute() / config.name


def prepare(config: Config, grid: Grid) -> tuple[list[Trial], dict[str, int]]:
    """The trials, with one store for all, and the steps of each; all input files are read here."""
    from pipeline.data.shards.index import load_index
    from pipeline.evaluation.datasets.overlap import check_overlap
    from pipeline.tracking.mlflow.uris import checked_uri

    trials = known_trials(config, grid)
    for path in {one.config.data.train for one in trials}:
        load_index(path)
    check_floor(config, trials, grid.floor)
    check_search(config, grid, trials)
    check_drift(trials, grid.max_drift)
    check_budgets(trials, configs_at_ends(config, grid.ranges))
    steps = steps_of(trials)
    for one in {(one.config.keep, one.config.eval): one for one in trials}.values():
        check_overlap(one.config)
    for table in _benchmarks(trials):
        table.check_paths()
    uri = config.tracking.uri
    if config.tracking.enabled and uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
        uri = checked_uri(None, Path(config.out).absolute())
    trials = [replace(one, config=override(one.config, {"tracking.uri": uri})) for one in trials]
    return trials, steps


def known_trials(config: Config, grid: Grid) -> list[Trial]:
    """The trials of the grid, with the names from an earlier call."""
    stored = _stored_trials(sweep_directory(config))
    return keep_names(expand(config, grid, stored), stored, config.seed)


def steps_of(trials: Sequence[Trial], samples: int | None = None) -> dict[str, int]:
    """Optimizer steps of each trial, 0 for a soup, which does not train.

    Args:
        samples: number of training images; None: read from the shards if the steps depend on it.

    Raises:
        ConfigError: the shards are needed and cannot be read.
    """
    from pipeline.data.shards.index import load_index
    from pipeline.training.settings import total_steps

    paths = {one.config.data.train for one in trials if one.config.train.steps is None}
    counts = {path: load_index(path).samples if samples is None else samples for path in paths}
    return {
        one.name: 0 if one.soup_of else total_steps(one.config, counts.get(one.config.data.train, 0)) for one in trials
    }


def absent(trials: Sequence[Trial]) -> list[str]:
    """A line for each requirement of the trials that this machine does not have."""
    from pipeline.data.shards.index import load_index

    lines = []
    for path in sorted({one.config.data.train for one in trials}):
        try:
            load_index(path)
        except ConfigError as error:
            lines.append(str(error).splitlines()[0])
    try:
        for table in _benchmarks(trials):
            table.check_paths()
    except ConfigError as error:
        lines.append(str(error).splitlines()[0])
    return lines


def check_floor(config: Config, trials: Sequence[Trial], floor: float | None, *, tables: bool = True) -> None:
    """Raise ConfigError if the benchmarks of the trials cannot measure id and kept at a floor.

    Args:
        tables: whether to read the benchmarks; without, only that there is one.
    """
    if floor is None:
        return
    if any(one.eval.benchmark is None for one in (config, *(trial.config for trial in trials))):
        raise ConfigError(f"floor: {floor:g} needs results of each trial; set eval.benchmark")
    for table in _benchmarks(trials) if tables else ():
        if not any(row.group != "id" and row.in_mean for row in table.rows):
            raise ConfigError(
                f"floor: {floor:g} is a share kept on groups other than id, and benchmark {table.name} has none; add a "
                "dataset of another group, or leave out floor"
            )
        if not any(row.group == "id" for row in table.rows):
            raise ConfigError(f"floor: trials are compared by the group id, and benchmark {table.name} has none")


def refuse_changes(sweep_dir: Path, trials: Sequence[Trial]) -> None:
    """Check that existing trials are unchanged; new ones may be added."""
    from pipeline.training.settings import changed_settings

    now, faults = {trial.name: trial for trial in trials}, []
    for entry in _stored_trials(sweep_dir):
        name = entry["name"]
        if name not in now:
            faults.append(f"{name} ({entry['label']}) is no longer in the grid")
            continue
        path = trial_dir(sweep_dir, name) / CONFIG_FILE
        changed = changed_settings(load_config(path), now[name].config) if path.is_file() else []
        faults += [f"{name}:", *changed] if changed else []
    if faults:
        raise ConfigError(
            f"{sweep_dir} holds a sweep with other settings; choose another name=… or restore them:\n"
            + "\n".join(faults)
        )


def write_layout(
    sweep_dir: Path,
    config: Config,
    grid: Grid,
    trials: Sequence[Trial],
    totals: dict[str, int],
    *,
    retry_failed: bool,
) -> None:
    """Write the files for the trials' processes: sweep.json, and each trial's config and state."""
    write_trials(sweep_dir, config, grid, trials)
    (sweep_dir / STOP_FILE).unlink(missing_ok=True)
    for trial in trials:
        write_trial(sweep_dir, trial, totals[trial.name], grid, retry_failed=retry_failed)


def write_trials(sweep_dir: Path, config: Config, grid: Grid, trials: Sequence[Trial]) -> None:
    """Write sweep.json."""
    entries = [_entry(one) for one in trials]
    write_sweep(sweep_dir, config, grid.source, entries, grid.floor, grid.max_drift)


def _entry(one: Trial) -> dict[str, Any]:
    """A trial's entry in sweep.json."""
    entry = {key: getattr(one, key) for key in ("id", "name", "label", "changes", "baseline", "configuration")}
    entry |= {"soup_of": list(one.soup_of)} if one.soup_of else {}
    return entry | ({"proposed": True} if one.proposed else {})


def write_trial(sweep_dir: Path, trial: Trial, steps: int, grid: Grid, *, retry_failed: bool = False) -> None:
    """Write a trial's config and state.

    A trial that is over waits again if its results lack a requested floor, or if the drift that stopped it is now
    allowed.
    """
    run_dir = trial_dir(sweep_dir, trial.name)
    write_config(run_dir, trial.config)
    if trial.soup_of:
        made = read_soup(run_dir)
        write_soup(run_dir, trial.soup_of, made.made_of if made else ())
    status = read_state(run_dir).status
    again = status not in OVER or (status == "failed" and (retry_failed or trial.soup_of))
    again = again or (
        status == "finished" and (_lacks_floor(run_dir, trial, grid.floor) or _is_stale(sweep_dir, trial))
    )
    if status == "stopped" and (alarm := read_alarm(run_dir)) is not None:
        again = grid.max_drift is None or alarm["drift"] <= grid.max_drift
    write_state(run_dir, total_steps=steps, **({"status": "waiting", "error": None} if again else {}))


class Proposals:
    """The configurations of a search that have not been proposed; each is laid out on request.

    Args:
        trials: trials of the sweep; new ones are appended.
        totals: steps of each trial; new ones are added.
        place: called with new trials before they are laid out.
    """

    def __init__(
        self,
        config: Config,
        grid: Grid,
        trials: list[Trial],
        totals: dict[str, int],
        place: Callable[[Sequence[Trial]], None],
    ) -> None:
        self._config, self._grid, self._trials, self._totals, self._place = config, grid, trials, totals, place
        self._dir, self._exhausted = sweep_directory(config), False
        self._expansion = Expansion(config, grid)
        for point in (*points_of(grid), *proposed_points(_stored_trials(self._dir))):
            self._expansion.add(point)

    @property
    def left(self) -> int:
        """Number of configurations that the sampler has yet to propose."""
        if self._grid.search is None or self._exhausted:
            return 0
        return max(0, self._grid.search.trials - len(_searched(self._trials)))

    def next(self) -> list[str]:
        """Names of the trials of the next configuration; empty if the search is complete or stopped."""
        if not self.left or (self._dir / STOP_FILE).exists():
            return []
        new = self._new_trials()
        if not new:
            self._exhausted = True
            fault = next(iter(self._expansion.faults), None)
            why = "has tried every configuration in the ranges" if fault is None else f"finds no valid one: {fault}"
            sys.stderr.write(f"the search {why}\n")
            return []
        known = [
            {"id": one.id, "name": one.name, "changes": one.changes, "baseline": one.baseline} for one in self._trials
        ]
        uri = self._trials[0].config.tracking.uri if self._trials else self._config.tracking.uri
        new = [
            replace(one, config=override(one.config, {"tracking.uri": uri}))
            for one in keep_names(new, known, self._config.seed)
        ]
        self._trials += new
        self._totals |= steps_of(new)
        self._place(new)
        write_trials(self._dir, self._config, self._grid, self._trials)
        for one in new:
            write_trial(self._dir, one, self._totals[one.name], self._grid)
        return [one.name for one in new if not one.soup_of]

    def _new_trials(self) -> list[Trial]:
        """The next proposal that is new and valid in the config."""
        search, tried = self._grid.search, self._tried()
        assert search is not None
        for attempt in range(ATTEMPTS):
            seed = stable_hash("search", self._config.seed, len(tried), attempt) % 2**32
            changes = propose(self._grid.ranges, tried, search, seed)
            self._expansion.faults.clear()
            if new := self._expansion.add(GridPoint(changes, list(changes), proposed=True)):
                return new
        return []

    def _tried(self) -> list[Tried]:
        """What is known in the ranges; earlier proposals may be outside, if a range has been changed since."""
        assert self._grid.floor is not None  # a search has a floor
        found = []
        for seeds in _searched(self._trials):
            point = {key: option(seeds[0].config, key) for key in self._grid.ranges}
            if not all(each.holds(point[key]) for key, each in self._grid.ranges.items()) or self._differs(seeds[0]):
                continue
            found.append(Tried(point, *value_of(self._dir, [one.name for one in seeds], self._grid.floor)))
        return found

    def _differs(self, trial: Trial) -> bool:
        """Whether a proposal from earlier ranges differs from the config in an option that has no range any more."""
        gone = trial.changes.keys() - self._grid.ranges.keys() - {"seed"}
        return trial.proposed and any(option(trial.config, key) != option(self._config, key) for key in gone)


def check_drift(trials: Sequence[Trial], max_drift: float | None) -> None:
    """Raise ConfigError if the drift is limited but no trial measures it."""
    if max_drift is not None and trials and not any(one.config.keep.weight for one in trials):
        raise ConfigError(
            f"max_drift: {max_drift:g} is measured on reference data, and no trial has any; set keep.weight, or leave "
            "out max_drift"
        )


def check_budgets(trials: Sequence[Trial], ends: Sequence[Config]) -> None:
    """Raise ConfigError if a budget of a trial, or at the end of a range, does not fit the blocks of its model."""
    budgeted = [one for one in trials if one.config.gated and one.config.gate.budgeted]
    also = [one for one in ends if one.gated and one.gate.budgeted]
    if budgeted or also:
        trained_parameters(budgeted, also)


def check_search(config: Config, grid: Grid, trials: Sequence[Trial]) -> None:
    """Raise ConfigError if the ranges contain invalid values of options, or exclude one of the grid's trials."""
    if grid.search is None:
        return
    configs_at_ends(config, grid.ranges)
    check_draws(config, grid.ranges)
    for first, *_ in _searched([one for one in trials if not one.proposed]):
        for key, each in grid.ranges.items():
            if not each.holds(value := option(first.config, key)):
                raise ConfigError(
                    f"grid: the first trial {first.name} has {key}={value}, outside ranges.{key}: {each}; name {key} "
                    "in the grid, or widen the range"
                )


def _searched(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The configurations of a search with their seeds: from the grid and the sampler, without baselines."""
    found: dict[str, list[Trial]] = {}
    for one in trials:
        if not one.baseline and not one.soup_of:
            found.setdefault(one.configuration, []).append(one)
    return list(found.values())


def _lacks_floor(run_dir: Path, trial: Trial, floor: float | None) -> bool:
    """Whether a floor is requested at which a finished trial was not evaluated."""
    if floor is None or trial.config.eval.benchmark is None:
        return False
    found = read_floors(run_dir / EVAL)
    return found is None or found["floor"] != floor or floor not in floors_of(found)


def renew_soups(sweep_dir: Path, trials: Sequence[Trial]) -> None:
    """Let soups wait again whose seeds have changed since they were made."""
    for one in trials:
        if one.soup_of and _is_stale(sweep_dir, one):
            write_state(trial_dir(sweep_dir, one.name), status="waiting", error=None)


def _is_stale(sweep_dir: Path, trial: Trial) -> bool:
    """Whether a soup was made from other trials than those that have finished by now."""
    soup = read_soup(trial_dir(sweep_dir, trial.name))
    return soup is not None and soup.made_of != finished_of(sweep_dir, soup.of)


def _benchmarks(trials: Sequence[Trial]) -> list[Benchmark]:
    from pipeline.evaluation.datasets.benchmark import load_benchmark

    named = dict.fromkeys((one.config.eval.benchmark, one.config.eval.root, one.config.eval.datasets) for one in trials)
    return [load_benchmark(name, root).choose(datasets) for name, root, datasets in named if name is not None]


def _stored_trials(sweep_dir: Path) -> list[dict[str, Any]]:
    """The trials of an earlier call; empty before the first."""
    return read_sweep(sweep_dir)["trials"] if is_sweep(sweep_dir) else []
