"""One trial without Ray: the training stage on every rank, the evaluation stage in one process.

By hand, for a trial of an existing sweep: python -m pipeline.tuning.trial SWEEP_DIR NAME. It exits with 0 if the trial
has finished, with 130 if it was stopped and can continue, and with 1 if it failed.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError, flatten, load_config
from pipeline.files import replace_text
from pipeline.runs.results import EVAL
from pipeline.runs.run import CONFIG_FILE, is_run, readable_steps, steps_done, write_gates
from pipeline.runs.sweep import (
    ALARM_FILE,
    BASELINES,
    STOP_FILE,
    TrialState,
    finished_of,
    floor_of,
    max_drift_of,
    read_alarm,
    read_soup,
    read_state,
    trial_dir,
    write_alarm,
    write_soup,
    write_state,
)
from pipeline.selection.drift import largest_drift

if TYPE_CHECKING:
    from pipeline.training.run import Watch

FAILURE_FILE = "failure.txt"
LOG_FILE = "log.txt"
_BASELINE_WAIT_SECONDS = 6 * 3600.0
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


class StopWatch:
    """Requests that a run save and stop once the sweep stops or the run has drifted too far (max_drift)."""

    def __init__(self, sweep_dir: Path, name: str | None = None) -> None:
        self._file = sweep_dir / STOP_FILE
        self._run_dir = None if name is None else trial_dir(sweep_dir, name)
        self._limit = None if name is None else max_drift_of(sweep_dir)
        self._alarmed = False

    def recorded(self, step: int, values: Mapping[str, float]) -> None:
        """Compare the drift with its limit; all ranks see the same values and stop at one step, rank 0 writes why."""
        drift = largest_drift(values)
        if self._limit is None or self._run_dir is None or drift is None or self._alarmed:
            return
        if not self._limit < drift < math.inf:  # nan and inf are of a run that diverges; its next step reports that
            return
        self._alarmed = True
        if os.environ.get("RANK", "0") == "0":
            write_alarm(self._run_dir, step, drift, self._limit)

    def stop_requested(self) -> bool:
        return self._alarmed or self._file.exists()


def trial_config(sweep_dir: Path, name: str) -> Config:
    """The config of a trial, as resolved by the sweep."""
    run_dir = trial_dir(sweep_dir, name)
    if not is_run(run_dir):
        raise ConfigError(f"{sweep_dir}: has no trial {name}")
    return load_config(run_dir / CONFIG_FILE)


def train_stage(sweep_dir: Path, name: str, watch: Watch | None = None) -> None:
    """Train, on every rank; continues from the last checkpoint, and does nothing after the last step.

    A failure that would repeat in every attempt is kept in failure.txt and makes the next attempt return at once. A
    failure of all ranks together is not raised either, because a launcher has nothing to end.
    """
    from pipeline.training.monitor import TrainingFailed
    from pipeline.training.run import train

    run_dir = trial_dir(sweep_dir, name)
    watch = watch or StopWatch(sweep_dir, name)
    if failure_of(run_dir) is not None or watch.stop_requested():
        return
    with _log(run_dir):
        try:
            train(trial_config(sweep_dir, name), watch, label=f"{sweep_dir.name}/{name}")
        except TrainingFailed as error:
            _keep_failure(run_dir, f"diverged: {error}" if "not finite" in str(error) else str(error))
        except Exception as error:
            reason = final_reason(error)
            if reason is not None:
                _keep_failure(run_dir, reason)
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            raise


def evaluation_stage(sweep_dir: Path, name: str) -> Mapping[str, Any] | None:
    """Evaluate the trained model on unfinished datasets and track the results; None without a benchmark.

    The first trial to arrive evaluates the untouched model; the others wait for it. A soup is made first.
    """
    from pipeline.data.storage.cache import Cache
    from pipeline.evaluation.auto_strength import evaluate_floors
    from pipeline.evaluation.datasets.benchmark import load_benchmark
    from pipeline.evaluation.datasets.dataset import OpenSets, Settings, batch_and_workers
    from pipeline.evaluation.record import track_floors, track_results
    from pipeline.evaluation.run import evaluate_run
    from pipeline.model.restore import find_run, load_both
    from pipeline.tracking.locks import Busy, ProcessLock

    config, run_dir = trial_config(sweep_dir, name), trial_dir(sweep_dir, name)
    make_soup(sweep_dir, name)
    if config.eval.benchmark is None:
        return None
    device = _device()
    batch_size, workers = batch_and_workers(device, config.eval.batch_size, config.eval.workers)
    settings = Settings(
        device=device,
        batch_size=batch_size,
        workers=workers,
        precision=config.eval.precision,
        preprocessing=config.eval.preprocessing,
        cache=Cache.named(config.eval.cache),
        opened=OpenSets(),
    )
    benchmark = load_benchmark(config.eval.benchmark, config.eval.root).choose(config.eval.datasets)
    baselines = sweep_dir / BASELINES
    with _log(run_dir):
        baselines.mkdir(parents=True, exist_ok=True)
        source = find_run(run_dir)
        both = load_both(source)
        with suppress(Busy), ProcessLock(baselines / ".lock", _BASELINE_WAIT_SECONDS):
            _evaluate_base(source, both.untouched, benchmark, settings, baselines)
        found = evaluate_run(run_dir, benchmark, run_dir / EVAL, settings, baselines=baselines, say=_say, both=both)
        step = source.step
        track_results(run_dir, config, step, found.results, found.summary)
        if (floor := floor_of(sweep_dir)) is not None:
            at = evaluate_floors(run_dir, benchmark, settings, floor, baselines=baselines, say=_say, both=both)
            track_floors(run_dir, config, step, at)
    return found.summary


def make_soup(sweep_dir: Path, name: str) -> None:
    """Write the mean of the seeds that have finished as the checkpoint of a trial, unless it is there."""
    from pipeline.model.soup import mean_weights, state_of_mean
    from pipeline.tracking.tracker import open_tracker
    from pipeline.training.checkpoint import save_checkpoint

    config, run_dir = trial_config(sweep_dir, name), trial_dir(sweep_dir, name)
    soup = read_soup(run_dir)
    if soup is None or soup.made_of == (finished := finished_of(sweep_dir, soup.of)):
        return
    folders = [trial_dir(sweep_dir, each) for each in finished]
    save_checkpoint(run_dir, mean_weights(folders), {}, state_of_mean(folders), keep_last=1)
    write_gates(run_dir, {})
    write_soup(run_dir, soup.of, finished)
    with open_tracker(
        run_dir,
        run_name=name,
        uri=config.tracking.uri,
        experiment=config.tracking.experiment,
        enabled=config.tracking.enabled,
        owns_status=False,
    ) as tracker:
        # The kind in which its seeds were trained, not the full fine-tuning as which it is stored.
        trained = flatten(load_config(folders[0] / CONFIG_FILE))
        tracker.params({**trained, "soup": True, "soup.of": " ".join(finished)})


def _evaluate_base(source: Any, untouched: Any, benchmark: Any, settings: Any, baselines: Path) -> None:
    from pipeline.evaluation.run import evaluate

    folder = baselines / source.base_digest[:16]
    if all((folder / f"{row.key}.json").is_file() for row in benchmark.rows):
        return
    evaluate(untouched, benchmark, folder, settings, say=lambda line: _say(f"untouched model: {line}"))


def begin(run_dir: Path) -> TrialState:
    """Record that a trial's training starts or continues."""
    for file in (FAILURE_FILE, ALARM_FILE):
        (run_dir / file).unlink(missing_ok=True)
    return write_state(run_dir, status="training", error=None, attempts=read_state(run_dir).attempts + 1)


def after_training(run_dir: Path) -> TrialState:
    """Record the result of the training stage: evaluating, failed, stopped by its drift, or waiting if interrupted."""
    step, reason = steps_done(run_dir), failure_of(run_dir)
    if reason is not None:
        return write_state(run_dir, status="failed", step=step, error=reason)
    if (alarm := read_alarm(run_dir)) is not None:
        reason = (
            f"stopped at step {alarm['step']}: its drift {alarm['drift']:.4f} is above max_drift {alarm['limit']:g}"
        )
        return write_state(run_dir, status="stopped", step=step, error=reason)
    if step < read_state(run_dir).total_steps:
        return write_state(run_dir, status="waiting", step=step)
    return write_state(run_dir, status="evaluating", step=step)


def run_trial(sweep_dir: Path, name: str) -> TrialState:
    """Run both stages of one trial in this process and record them in trial.json; for use by hand and in tests."""
    run_dir = trial_dir(sweep_dir, name)
    begin(run_dir)
    try:
        if steps_done(run_dir) < read_state(run_dir).total_steps:
            train_stage(sweep_dir, name)
        state = after_training(run_dir)
        if state.status == "evaluating":
            evaluation_stage(sweep_dir, name)
            state = write_state(run_dir, status="finished")
    except Exception as error:  # noqa: BLE001 - any failure is recorded in the trial's state
        reason = final_reason(error) or str(error)
        state = write_state(run_dir, status="failed", step=readable_steps(run_dir), error=reason)
    return state


def failure_of(run_dir: Path) -> str | None:
    """Why training cannot succeed, as written by a rank; None if no rank wrote it."""
    try:
        return (run_dir / FAILURE_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def final_reason(error: BaseException) -> str | None:
    """The reason in words if another attempt would fail in the same way, else None."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"out of memory: {first}"
    return None


def _keep_failure(run_dir: Path, reason: str) -> None:
    replace_text(run_dir / FAILURE_FILE, reason + "\n")


@contextmanager
def _log(run_dir: Path) -> Iterator[None]:
    """Redirect the run's output to its own log; the terminal of a sweep shows the table."""
    rank = os.environ.get("RANK", "0")
    with (run_dir / LOG_FILE if rank == "0" else run_dir / f"log-{rank}.txt").open(
        "a", buffering=1, encoding="utf-8"
    ) as log:
        with redirect_stderr(log):
            yield


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


if __name__ == "__main__":
    ended = run_trial(Path(sys.argv[1]).absolute(), sys.argv[2])
    print(ended)  # noqa: T201
    sys.exit({"finished": 0, "waiting": 130}.get(ended.status, 1))
