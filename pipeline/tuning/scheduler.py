"""Trials on Ray: a Tune trial starts its ranks (cluster/ranks.py), which call the same `train` as `selora train`.

Ray is imported only inside functions, here and in cluster/: its settings must be in the environment before.

The state of a trial is in its run directory (checkpoints, journal, trial.json) on a disk that all nodes share, not in
Ray: any worker, node or driver may die, and the next `train` on the directory continues.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.runs.run import readable_steps, steps_done
from pipeline.runs.sweep import OVER, TrialState, read_state, trial_dir, write_state
from pipeline.tracking.journal import JOURNAL, Record, decode, read
from pipeline.tuning.cluster.ranks import Size, run_alone, run_ranks
from pipeline.tuning.cluster.ray_errors import RanksFailed, reason_behind
from pipeline.tuning.grid import Asha, Resources
from pipeline.tuning.trial import (
    StopWatch,
    after_training,
    begin,
    evaluation_stage,
    failure_of,
    train_stage,
)

# A trial's own process only waits for its workers and needs no core, but Tune requires some share.
_TRIAL_SHARE = {"memory": float(2**20)}
_TEARDOWN_SECONDS = 5.0
_LOSS = "train/loss"


@dataclass(frozen=True)
class TrialJob:
    """What is sent to every trial."""

    sweep_dir: Path
    workdir: Path
    resources: Resources
    halving: bool = False  # whether the loss of a trial is reported, so that the halving may stop it
    spared: tuple[str, ...] = ()  # trials that it may not

    def watches(self, name: str) -> bool:
        """Whether the loss of a trial is reported."""
        return self.halving and name not in self.spared

    @property
    def eval_gpus(self) -> float:
        given = self.resources.eval_gpus
        return self.resources.gpus_per_worker if given is None else given


class Interrupted(Exception):
    """A stop of the sweep was requested, and every trial has saved or has had enough time to."""


def watch_nodes(sweep_dir: Path, seconds: float) -> list[Any]:
    """Sample every other machine of the cluster into the sweep's directory for as long as the result is kept."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = socket.gethostname()
    others = {node["NodeManagerHostname"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    machine = ray.remote(num_cpus=0)(_Machine)
    return [
        machine.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            sweep_dir, name, seconds
        )
        for name, node_id in others.items()
        if name != here
    ]


class _Machine:
    """Runs on one node and owns the process that samples it."""

    def __init__(self, sweep_dir: Path, name: str, seconds: float) -> None:
        from pipeline.tracking.tracker import watch_machine

        self._sampler = watch_machine(sweep_dir, name, seconds)


def run_trials(
    job: TrialJob,
    names: Sequence[str],
    *,
    concurrent: int,
    asha: Asha | None,
    steps: int,
    tick: Callable[[], None],
    more: Callable[[], list[str]] | None = None,
) -> dict[str, str]:
    """Run the named trials, `concurrent` at a time; the end of each is in its trial.json.

    Args:
        tick: called in every round of Tune's loop; if it raises (Interrupted), everything ends.
        more: returns the names of further trials once all of these have begun; empty at the end.

    Returns:
        {name: reason} of the trials whose own process was lost before it could write its state.
    """
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler

    halving = None
    if asha is not None:
        halving = AsyncHyperBandScheduler(
            time_attr="step",
            metric="loss",
            mode="min",
            max_t=steps,
            grace_period=min(asha.grace_steps, steps),
            reduction_factor=asha.reduction,
            stop_last_trials=False,  # the evaluation follows the last step
        )
    tuner = tune.Tuner(
        tune.with_resources(partial(_trial, job=job), _TRIAL_SHARE),
        param_space={"trial": tune.grid_search(list(names))} if more is None else {},
        tune_config=tune.TuneConfig(
            search_alg=None if more is None else _queue(names, more),
            num_samples=1 if more is None else -1,  # until the queue ends
            max_concurrent_trials=concurrent,
            scheduler=halving,
            reuse_actors=asha is None,
            trial_dirname_creator=_dirname,
        ),
        run_config=tune.RunConfig(
            # New for every call, because everything needed to continue is in the run directories.
            name=f"tune-{int(time.time())}",
            storage_path=str(job.sweep_dir / "ray"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=job.resources.retries),  # of the trial's own process
            callbacks=[_ticking(tick)],
        ),
    )
    return {one.config["trial"]: reason_behind(one.error) for one in tuner.fit() if one.error and one.config}


def _queue(names: Sequence[str], more: Callable[[], list[str]]) -> Any:
    """The trials in their order, for Tune, which requests one whenever resources are free."""
    from ray.tune.search import Searcher

    class Queue(Searcher):
        def __init__(self, names: list[str], more: Callable[[], list[str]]) -> None:
            super().__init__(metric="status", mode="max")
            self._names, self._more = names, more

        def set_search_properties(self, *_: Any, **__: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:  # noqa: ARG002
            if not self._names:
                self._names += self._more()
            return {"trial": self._names.pop(0)} if self._names else Searcher.FINISHED

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()  # everything to save is in the trials' directories

        def restore(self, checkpoint_path: str) -> None: ...

        def __getstate__(self) -> dict[str, Any]:
            return {}

    return Queue(list(names), more)


def _dirname(trial: Any) -> str:
    return str(trial.config["trial"])


def _ticking(tick: Callable[[], None]) -> Any:
    from ray import tune

    class Tick(tune.Callback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
            tick()

    return Tick()


def _trial(config: Mapping[str, Any], job: TrialJob) -> dict[str, Any]:
    """One trial, in a Tune actor: the training on its workers, then the evaluation as a separate step."""
    name = config["trial"]
    run_dir = trial_dir(job.sweep_dir, name)
    if read_state(run_dir).status in OVER or StopWatch(job.sweep_dir).stop_requested():
        return {"status": read_state(run_dir).status}
    begin(run_dir)
    try:
        if steps_done(run_dir) < read_state(run_dir).total_steps:
            _fit(name, job)
        state = after_training(run_dir)
        if state.status == "evaluating":
            _evaluate(name, job)
            state = write_state(run_dir, status="finished")
    except Exception as error:  # noqa: BLE001 - any failure is recorded in the trial's state, and the others continue
        state = _note_failure(run_dir, job, error)
    return {"status": state.status}


def _note_failure(run_dir: Path, job: TrialJob, error: BaseException) -> TrialState:
    """Whether a failure belongs to the trial; the end of the whole cluster would also end this process."""
    if failure_of(run_dir) is None:
        time.sleep(_TEARDOWN_SECONDS)
    step = readable_steps(run_dir)
    if StopWatch(job.sweep_dir).stop_requested():
        return write_state(run_dir, status="waiting", step=step)
    return write_state(run_dir, status="failed", step=step, error=_reason(run_dir, error))


def _fit(name: str, job: TrialJob) -> None:
    """Train on all ranks; after a lost process they begin again from the last checkpoint, `retries` times."""
    run_dir, watch, size = trial_dir(job.sweep_dir, name), StopWatch(job.sweep_dir), job.resources
    losses = _Losses(run_dir) if job.watches(name) else None
    each = Size(size.workers, size.cpus_per_worker, size.gpus_per_worker)
    for left in reversed(range(size.retries + 1)):
        try:
            run_ranks(
                train_stage,
                (job.sweep_dir, name),
                each,
                job.workdir,
                tick=losses.report if losses is not None else lambda: None,
                stopped=watch.stop_requested,
            )
            return
        except RanksFailed:
            if not left or failure_of(run_dir) is not None or watch.stop_requested():
                raise


class _Losses:
    """Reports the losses that a trial's journal gains, by which trials are compared while they train."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / JOURNAL
        self._end = self._path.stat().st_size if self._path.is_file() else 0

    def report(self) -> None:
        from ray import tune

        for record in read(self._path, self._end) if self._path.is_file() else ():
            self._end = record.end
            if isinstance(record, Record) and record.kind == "metrics" and _LOSS in record.data["values"]:
                tune.report({"step": record.data["step"], "loss": decode(record.data["values"][_LOSS])})


def _evaluate(name: str, job: TrialJob) -> None:
    size = Size(1, job.resources.eval_cpus, job.eval_gpus)
    run_alone(evaluation_stage, (job.sweep_dir, name), size, job.workdir, job.resources.retries)


def _reason(run_dir: Path, error: BaseException) -> str:
    """Why a trial failed, in a line or two: as written by a rank, otherwise Ray's report on its worker."""
    return failure_of(run_dir) or reason_behind(error)
