"""`selora sweep`: expand and check the grid, claim the directory, run the remaining trials, report how each ended.

The same call continues a sweep, because the state of each trial is in its directory. Ray is not imported before the
trials start, and torch only if a budget must fit the blocks of the model.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.data.storage.folders import STORE_PASSWORD
from pipeline.passwords import password_in
from pipeline.runs.run import readable_steps
from pipeline.runs.sweep import OVER, STOP_FILE, TrialState, finished_of, read_state, trial_dir, write_state
from pipeline.tuning.grid import Grid, Resources
from pipeline.tuning.layout import (
    Proposals,
    absent,
    check_drift,
    check_floor,
    check_search,
    known_trials,
    prepare,
    refuse_changes,
    renew_soups,
    steps_of,
    sweep_directory,
    write_layout,
)
from pipeline.tuning.plan import (
    Capacity,
    Node,
    Plan,
    Speed,
    checkpoint_bytes,
    describe_plan,
    make_plan,
    room_faults,
    trained_parameters,
)
from pipeline.tuning.search import configs_at_ends
from pipeline.tuning.trials import Trial

_GRACE_SECONDS = 120.0
_ROOM_SECONDS = 30.0  # between two looks at the nodes of the cluster


@dataclass(frozen=True)
class SweepOutcome:
    """The result of a sweep: its directory and every trial's state, in the order of the grid.

    Attributes:
        to_come: number of configurations that a sampler has yet to propose.
    """

    directory: Path
    trials: dict[str, TrialState]
    table: str
    to_come: int = 0

    @property
    def complete(self) -> bool:
        """Whether every trial has ended, however it ended."""
        return not self.to_come and all(state.status in OVER for state in self.trials.values())

    @property
    def finished(self) -> list[str]:
        return [name for name, state in self.trials.items() if state.status == "finished"]

    @property
    def failed(self) -> list[str]:
        return [name for name, state in self.trials.items() if state.status == "failed"]


def plan_sweep(
    config: Config,
    grid: Grid,
    *,
    address: str | None = None,
    seconds_per_step: float | None = None,
    samples: int | None = None,
) -> Plan:
    """The plan of the sweep; writes nothing, and reads shards and evaluation sets only if they are needed.

    Args:
        address: address of a Ray cluster; None: this machine.
        samples: number of training images, for counting epochs; None: read from the shards.

    Raises:
        ConfigError: a mistake in the config or the grid, or an unknown number of steps.
    """
    from pipeline.tuning.progress import learned_drift

    _hand_down_passwords(config)
    trials = known_trials(config, grid)
    missing = absent(trials)
    check_floor(config, trials, grid.floor, tables=not missing)
    check_search(config, grid, trials)
    check_drift(trials, grid.max_drift)
    try:
        totals = steps_of(trials, samples)
    except ConfigError as error:
        raise ConfigError(f"{error}\na plan without the shards needs --samples N, or train.steps") from None
    sweep_dir = sweep_directory(config)
    refuse_changes(sweep_dir, trials)
    proposals = Proposals(config, grid, trials, totals, lambda _: None).left
    capacity = _look(address, grid.resources)
    plan = _plan(sweep_dir, trials, totals, grid, capacity, seconds_per_step, proposals)
    if faults := room_faults(grid.resources, capacity):
        if address is not None or "RAY_ADDRESS" in os.environ:
            raise ConfigError("\n".join(faults))
        *rest, last, advice = faults
        missing += [*rest, f"{last}; {advice}"]
    training = [one for one in trials if not one.soup_of]
    drift = None if grid.floor is None else learned_drift(sweep_dir, trials, grid.floor)
    disk = checkpoint_bytes(training, trained_parameters(training, configs_at_ends(config, grid.ranges)))
    return replace(plan, disk_bytes=disk, drift=drift, absent=tuple(missing))


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
        address: address of a Ray cluster; None: RAY_ADDRESS, else a cluster on this machine for the duration of the
            call.
        retry_failed: also run failed trials again.

    Raises:
        ConfigError: every mistake that can be found before the first trial starts. A trial that fails later is recorded
            in its trial.json, in the table and in MLflow, and the others continue.
    """
    from pipeline.tuning.mlflow_runs import SweepRuns
    from pipeline.tuning.progress import describe

    trials, totals = prepare(config, grid)
    sweep_dir = sweep_directory(config)
    refuse_changes(sweep_dir, trials)
    with SweepRuns(sweep_dir, config, grid, trials) as record:
        if len(known_trials(config, grid)) > len(trials):  # another command has proposed some and ended since
            trials, totals = prepare(config, grid)
            record.place(trials)
        refuse_changes(sweep_dir, trials)
        write_layout(sweep_dir, config, grid, trials, totals, retry_failed=retry_failed)
        proposals = Proposals(config, grid, trials, totals, record.place)
        if _left(sweep_dir, trials) or proposals.left:
            _run(sweep_dir, grid, trials, totals, proposals, address, seconds_per_step)
        states = {trial.name: read_state(trial_dir(sweep_dir, trial.name)) for trial in trials}
        outcome = SweepOutcome(sweep_dir, states, describe(sweep_dir, trials, grid.floor), proposals.left)
        record.close(outcome.trials, outcome.table, complete=outcome.complete)
    return outcome


def _left(sweep_dir: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that are not over."""
    return [trial for trial in trials if read_state(trial_dir(sweep_dir, trial.name)).status not in OVER]


def _look(address: str | None, resources: Resources) -> Capacity:
    """The capacity of the cluster at the address, or of this machine, without starting a cluster."""
    if address is None and "RAY_ADDRESS" not in os.environ:
        import torch

        return Capacity((Node("here", len(os.sched_getaffinity(0)), torch.cuda.device_count()),))
    from pipeline.tuning.cluster.connect import cluster

    with cluster(address, resources) as capacity:
        return capacity


def _plan(
    sweep_dir: Path,
    trials: Sequence[Trial],
    totals: dict[str, int],
    grid: Grid,
    capacity: Capacity,
    seconds_per_step: float | None,
    proposals: int = 0,
) -> Plan:
    """The plan of the remaining work, including configurations that a sampler has yet to propose."""
    from pipeline.tuning.progress import measured_speed

    states = {trial.name: read_state(trial_dir(sweep_dir, trial.name)) for trial in trials}
    left = {name: max(0, totals[name] - state.step) for name, state in states.items() if state.status not in OVER}
    speed = Speed(seconds_per_step, "as given") if seconds_per_step else measured_speed(sweep_dir, trials)
    to_come = proposals * max(1, len(grid.seeds))
    each = max(totals.values(), default=0)
    return make_plan(trials, left, grid.resources, capacity, speed=speed, to_come=to_come, each=each)


def _run(
    sweep_dir: Path,
    grid: Grid,
    trials: list[Trial],
    totals: dict[str, int],
    proposals: Proposals,
    address: str | None,
    seconds_per_step: float | None,
) -> None:
    from pipeline.tuning.cluster.connect import capacity as look
    from pipeline.tuning.cluster.connect import cluster
    from pipeline.tuning.mlflow_runs import MACHINE_SECONDS
    from pipeline.tuning.progress import Progress
    from pipeline.tuning.scheduler import Interrupted, TrialJob, run_trials, watch_nodes

    stop, room = _Stop(sweep_dir, trials), _Room(grid.resources, look)

    def tick() -> None:
        stop.tick()
        room.tick()

    with stop, cluster(address, grid.resources) as capacity:
        stop.listen()  # Ray has replaced it by its own handler
        if faults := room_faults(grid.resources, capacity):
            raise ConfigError("\n".join(faults))
        plan = _plan(sweep_dir, trials, totals, grid, capacity, seconds_per_step, proposals.left)
        sys.stderr.write(describe_plan(plan) + "\n")
        spared = tuple(trial.name for trial in trials if trial.baseline)
        job = TrialJob(sweep_dir, Path.cwd(), grid.resources, grid.asha is not None, spared)
        machines = watch_nodes(sweep_dir, MACHINE_SECONDS)
        steps = max([*totals.values(), plan.steps_to_come])
        run = partial(run_trials, job, concurrent=plan.concurrent, steps=steps, tick=tick)
        lost: dict[str, str] = {}
        with Progress(sweep_dir, trials, grid.floor), suppress(Interrupted):
            training = [trial.name for trial in _left(sweep_dir, trials) if not trial.soup_of]
            if training or proposals.left:
                lost |= run(training, asha=grid.asha, more=None if grid.search is None else proposals.next)
            renew_soups(sweep_dir, trials)
            if soups := _ready_soups(sweep_dir, [trial for trial in _left(sweep_dir, trials) if trial.soup_of]):
                lost |= run(soups, asha=None)
        del machines
    _record_ends(sweep_dir, trials, lost, stop.requested)


def _ready_soups(sweep_dir: Path, soups: Sequence[Trial]) -> list[str]:
    """The soups that can be made now: all of their trials are over and two have finished."""
    ready = []
    for soup in soups:
        states = [read_state(trial_dir(sweep_dir, name)).status for name in soup.soup_of]
        if not all(status in OVER for status in states):
            continue
        if len(found := finished_of(sweep_dir, soup.soup_of)) > 1:
            ready.append(soup.name)
        else:
            reason = f"a mean needs two finished seeds, and there is {found[0] if found else 'none'}"
            write_state(trial_dir(sweep_dir, soup.name), status="failed", error=reason)
    return ready


def _hand_down_passwords(config: Config) -> None:
    """Pass the password in the environment, because it is not in the trials' config files."""
    for address in (config.data.train, config.eval.root):
        password = password_in(address or "")
        if password is not None:
            os.environ.setdefault(STORE_PASSWORD, password)


def _record_ends(sweep_dir: Path, trials: Sequence[Trial], lost: dict[str, str], interrupted: bool) -> None:
    """Record the end of every trial whose own process could not record it."""
    from pipeline.tuning.progress import last_values

    for trial in trials:
        run_dir = trial_dir(sweep_dir, trial.name)
        if read_state(run_dir).status not in ("training", "evaluating"):
            continue
        step = readable_steps(run_dir)
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


class _Room:
    """Says when the cluster has no room for a trial any more, such as after a node came back with fewer GPUs.

    Ray itself waits for room without a word and without end.
    """

    def __init__(self, resources: Resources, look: Callable[[], Capacity]) -> None:
        self._resources, self._look = resources, look
        self._lacks, self._looked = False, time.monotonic()

    def tick(self) -> None:
        """Look at the nodes now and then; a line when the room goes, and a line when it is back."""
        if time.monotonic() - self._looked < _ROOM_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            nodes = self._look()
        except Exception:  # noqa: BLE001 - a head that does not answer is Ray's to report, and may be back
            return
        faults = room_faults(self._resources, nodes)
        if faults and not self._lacks:
            sys.stderr.write(
                f"{faults[0]}; trials wait for a node with room. Ctrl-C ends the sweep, and the same command "
                "continues it\n"
            )
        elif self._lacks and not faults:
            sys.stderr.write("the cluster has room for a trial again\n")
        self._lacks = bool(faults)


class _Stop:
    """On Ctrl-C or SIGTERM, request that the trials save and stop; a second signal ends them at once."""

    def __init__(self, sweep_dir: Path, trials: Sequence[Trial]) -> None:
        self.requested = False
        self._dir, self._trials = sweep_dir, trials
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
        """Install the signal handlers, replacing later ones; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.signal(number, self._note)
            self._previous.setdefault(number, handler)

    def tick(self) -> None:
        """Raise Interrupted once a stop has been requested and no trial is training any more."""
        from pipeline.tuning.scheduler import Interrupted

        now = time.monotonic()
        if not self.requested or now - self._looked < 0.5:
            return
        self._looked = now
        states = [read_state(trial_dir(self._dir, trial.name)) for trial in self._trials]
        training = [state for state in states if state.status == "training"]
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
