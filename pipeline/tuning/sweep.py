"""`selora sweep`: expand the grid, check it, claim the directory, run the remaining trials, report how each ended.

The same call continues a sweep, because the state of each trial is in its directory. Nothing here imports Ray or torch
until the trials start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.config import Config, ConfigError, load_config, override
from pipeline.data.storage.folders import STORE_PASSWORD
from pipeline.passwords import password_in
from pipeline.runs.run import CONFIG_FILE, steps_done, write_config
from pipeline.runs.sweep import (
    OVER,
    STOP_FILE,
    TrialState,
    is_sweep,
    read_state,
    read_sweep,
    trial_dir,
    write_state,
    write_sweep,
)
from pipeline.tuning.grid import Grid, Resources, Trial, expand, keep_names
from pipeline.tuning.plan import Capacity, Node, Plan, Speed, describe_plan, make_plan

_GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class SweepOutcome:
    """The result of a sweep: its directory and every trial's state, in the order of the grid."""

    directory: Path
    trials: dict[str, TrialState]
    table: str

    @property
    def complete(self) -> bool:
        """Whether every trial has ended, in any way."""
        return all(state.status in OVER for state in self.trials.values())

    @property
    def finished(self) -> list[str]:
        return [name for name, state in self.trials.items() if state.status == "finished"]

    @property
    def failed(self) -> list[str]:
        return [name for name, state in self.trials.items() if state.status == "failed"]


def plan_sweep(
    config: Config, grid: Grid, *, address: str | None = None, seconds_per_step: float | None = None
) -> Plan:
    """The plan of the sweep; writes nothing. Without an address, for this machine."""
    from pipeline.tuning.disk import checkpoint_bytes, trained_parameters

    _hand_down_passwords(config)
    trials, totals = _prepare(config, grid)
    sweep_dir = _directory(config)
    _refuse_changes(sweep_dir, trials)
    plan = _plan(sweep_dir, trials, totals, grid.resources, _look(address, grid.resources), seconds_per_step)
    return replace(plan, disk_bytes=checkpoint_bytes(trials, trained_parameters(trials)))


def sweep(
    config: Config,
    grid: Grid,
    *,
    address: str | None = None,
    retry_failed: bool = False,
    seconds_per_step: float | None = None,
) -> SweepOutcome:
    """Train and evaluate every trial of the grid; the same call continues with the remaining ones.

    Args:
        address: of a Ray cluster; None: RAY_ADDRESS, else a cluster on this machine for the time of the call.
        retry_failed: also run failed trials again.

    Raises:
        ConfigError: every mistake that can be known before the first trial starts. A trial that fails later is named in
            its trial.json, in the table and in MLflow, and the others go on.
    """
    from pipeline.tuning.mlflow_runs import SweepRuns
    from pipeline.tuning.progress import describe

    trials, totals = _prepare(config, grid)
    sweep_dir = _directory(config)
    _refuse_changes(sweep_dir, trials)
    with SweepRuns(sweep_dir, config, grid, trials) as record:
        _write(sweep_dir, config, grid, trials, totals, retry_failed=retry_failed)
        left = [trial for trial in trials if read_state(trial_dir(sweep_dir, trial.name)).status not in OVER]
        if left:
            _run(sweep_dir, grid, trials, left, totals, address, seconds_per_step)
        states = {trial.name: read_state(trial_dir(sweep_dir, trial.name)) for trial in trials}
        outcome = SweepOutcome(sweep_dir, states, describe(sweep_dir, trials))
        record.close(outcome.trials, outcome.table, complete=outcome.complete)
    return outcome


def _directory(config: Config) -> Path:
    return Path(config.out).absolute() / config.name


def _prepare(config: Config, grid: Grid) -> tuple[list[Trial], dict[str, int]]:
    """The trials, with one store for all, and the steps of each; all files are read now."""
    from pipeline.data.shards.index import load_index
    from pipeline.evaluation.datasets.benchmark import load_benchmark
    from pipeline.evaluation.datasets.overlap import check_overlap
    from pipeline.tracking.mlflow.uris import checked_uri
    from pipeline.training.settings import total_steps

    trials = keep_names(expand(config, grid), _stored_trials(_directory(config)))
    samples = {path: load_index(path).samples for path in {one.config.data.train for one in trials}}
    asked = {(one.config.eval.benchmark, one.config.eval.root, one.config.eval.datasets) for one in trials}
    for one in {(one.config.keep, one.config.eval): one for one in trials}.values():
        check_overlap(one.config)
    for benchmark, root, datasets in asked:
        if benchmark is not None:
            load_benchmark(benchmark, root).choose(datasets).check_paths()
    uri = config.tracking.uri
    if config.tracking.enabled and uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
        uri = checked_uri(None, Path(config.out).absolute())
    trials = [replace(one, config=override(one.config, {"tracking.uri": uri})) for one in trials]
    return trials, {one.name: total_steps(one.config, samples[one.config.data.train]) for one in trials}


def _stored_trials(sweep_dir: Path) -> list[dict[str, Any]]:
    """The trials of an earlier call, none before the first."""
    return read_sweep(sweep_dir)["trials"] if is_sweep(sweep_dir) else []


def _refuse_changes(sweep_dir: Path, trials: Sequence[Trial]) -> None:
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


def _write(
    sweep_dir: Path,
    config: Config,
    grid: Grid,
    trials: Sequence[Trial],
    totals: dict[str, int],
    *,
    retry_failed: bool,
) -> None:
    """Write what the trials' processes read: sweep.json, and each trial's config and state."""
    entries = [
        {"id": one.id, "name": one.name, "label": one.label, "changes": one.changes, "baseline": one.baseline}
        for one in trials
    ]
    write_sweep(sweep_dir, config, grid.source, entries)
    (sweep_dir / STOP_FILE).unlink(missing_ok=True)
    for trial in trials:
        run_dir = trial_dir(sweep_dir, trial.name)
        write_config(run_dir, trial.config)
        status = read_state(run_dir).status
        again = status not in OVER or (status == "failed" and retry_failed)
        write_state(run_dir, total_steps=totals[trial.name], **({"status": "waiting", "error": None} if again else {}))


def _look(address: str | None, resources: Resources) -> Capacity:
    """The capacity of the cluster at the address, or of this machine, without starting a cluster."""
    if address is None and "RAY_ADDRESS" not in os.environ:
        import torch

        return Capacity((Node("here", len(os.sched_getaffinity(0)), torch.cuda.device_count()),))
    from pipeline.tuning.scheduler import cluster

    with cluster(address, resources) as capacity:
        return capacity


def _plan(
    sweep_dir: Path,
    trials: Sequence[Trial],
    totals: dict[str, int],
    resources: Resources,
    capacity: Capacity,
    seconds_per_step: float | None,
) -> Plan:
    from pipeline.tuning.progress import measured_speed

    states = {trial.name: read_state(trial_dir(sweep_dir, trial.name)) for trial in trials}
    left = {name: totals[name] - state.step for name, state in states.items() if state.status not in OVER}
    speed = Speed(seconds_per_step, "as given") if seconds_per_step else measured_speed(sweep_dir, trials)
    return make_plan(trials, left, resources, capacity, speed=speed)


def _run(
    sweep_dir: Path,
    grid: Grid,
    trials: Sequence[Trial],
    left: Sequence[Trial],
    totals: dict[str, int],
    address: str | None,
    seconds_per_step: float | None,
) -> None:
    from pipeline.tuning.mlflow_runs import MACHINE_SECONDS
    from pipeline.tuning.progress import Progress
    from pipeline.tuning.scheduler import Interrupted, TrialJob, cluster, run_trials, watch_nodes

    stop = _Stop(sweep_dir, [trial.name for trial in left])
    with stop, cluster(address, grid.resources) as capacity:
        stop.listen()  # Ray has replaced it by its own handler
        plan = _plan(sweep_dir, trials, totals, grid.resources, capacity, seconds_per_step)
        sys.stderr.write(describe_plan(plan) + "\n")
        watched = tuple(trial.name for trial in left if grid.asha is not None and not trial.baseline)
        job = TrialJob(sweep_dir, Path.cwd(), grid.resources, bool(grid.resources.gpus_per_worker), watched)
        machines = watch_nodes(sweep_dir, MACHINE_SECONDS)
        with Progress(sweep_dir, trials):
            try:
                lost = run_trials(
                    job,
                    [trial.name for trial in left],
                    concurrent=plan.concurrent,
                    asha=grid.asha,
                    steps=max(totals.values()),
                    tick=stop.tick,
                )
            except Interrupted:
                lost = {}
        del machines
    _settle(sweep_dir, left, lost, stop.requested)


def _hand_down_passwords(config: Config) -> None:
    """Pass the password in the environment, because the trials' config files do not contain it."""
    for address in (config.data.train, config.eval.root):
        password = password_in(address or "")
        if password is not None:
            os.environ.setdefault(STORE_PASSWORD, password)


def _settle(sweep_dir: Path, left: Sequence[Trial], lost: dict[str, str], interrupted: bool) -> None:
    """Record the end of every trial whose own process could not."""
    from pipeline.tuning.progress import last_values

    for trial in left:
        run_dir = trial_dir(sweep_dir, trial.name)
        if read_state(run_dir).status not in ("training", "evaluating"):
            continue
        step = steps_done(run_dir)
        if interrupted:
            write_state(run_dir, status="waiting", step=step)
        elif trial.name in lost:
            write_state(run_dir, status="failed", step=step, error=lost[trial.name])
        else:
            at, values = last_values(run_dir)
            reason = (
                f"stopped at step {at}: its loss {values.get('train/loss', float('nan')):.4f} was behind the others'"
            )
            write_state(run_dir, status="stopped", step=at, error=reason)


class _Stop:
    """On Ctrl-C or SIGTERM, ask the trials to save and stop; the second signal ends them at once."""

    def __init__(self, sweep_dir: Path, names: Sequence[str]) -> None:
        self.requested = False
        self._dir, self._names = sweep_dir, names
        self._deadline, self._looked = 0.0, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.requested:
            (self._dir / STOP_FILE).unlink(missing_ok=True)

    def listen(self) -> None:
        """Install the signal handlers, also over those installed since; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.signal(number, self._note)
            self._previous.setdefault(number, handler)

    def tick(self) -> None:
        """Raise Interrupted once a stop was requested and no trial is training any more."""
        from pipeline.tuning.scheduler import Interrupted

        now = time.monotonic()
        if not self.requested or now - self._looked < 0.5:
            return
        self._looked = now
        training = [name for name in self._names if read_state(trial_dir(self._dir, name)).status == "training"]
        if not training or now > self._deadline:
            raise Interrupted

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._deadline = time.monotonic() + _GRACE_SECONDS
        (self._dir / STOP_FILE).touch()
        sys.stderr.write(
            f"\n{signal.Signals(number).name}: the trials save and stop after their step; a second signal ends them "
            "at once. The same command continues.\n"
        )
