"""Trials on Ray: a Tune trial is a TorchTrainer whose workers call the same `train` as `selora train`.

The only importer of ray, and only inside functions: its settings must be in the environment before it is imported.

The state of a trial is in its run directory (checkpoints, journal, trial.json), on a disk that all nodes share, and not
in Ray: any worker, node or driver may die, and the next `train` on the directory continues.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.runs.run import steps_done
from pipeline.runs.sweep import OVER, TrialState, read_state, trial_dir, write_state
from pipeline.tracking.tracker import SHIPPED_VARIABLE
from pipeline.tuning.environment import kept_back, passed_on, short_sockets
from pipeline.tuning.grid import Asha, Resources
from pipeline.tuning.plan import Capacity, Node
from pipeline.tuning.ray_errors import check_reachable, token_fault, told
from pipeline.tuning.trial import (
    StopWatch,
    after_training,
    begin,
    evaluation_stage,
    failure_of,
    train_stage,
    trial_config,
)

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_OBJECT_STORE_BYTES = 100 * 2**20  # only configs pass through it
# A trial's own process only waits for its workers and should take no core from them, but Tune requires some share.
_TRIAL_SHARE = {"memory": float(2**20)}
_TEARDOWN_SECONDS = 5.0
_CHANCES = 4  # to start a local cluster
# Of the driver and of the trials' processes: no usage report over the network, no doubled prints, our own paths.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_niceness": "0",  # as in `selora train`; with Ray's 15, any other process would starve a trial
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Else a process that reserves no GPU sees all of them, and takes the first.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last report, after its evaluation, has no loss
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}


@dataclass(frozen=True)
class TrialJob:
    """What is sent to every trial."""

    sweep_dir: Path
    workdir: Path
    resources: Resources
    on_gpu: bool
    watched: tuple[str, ...]  # trials whose loss is reported, so that the halving may stop them

    @property
    def eval_gpus(self) -> float:
        given = self.resources.eval_gpus
        return self.resources.gpus_per_worker if given is None else given


class Interrupted(Exception):
    """The sweep was asked to stop, and every trial has saved or has had enough time to."""


@contextmanager
def cluster(address: str | None, resources: Resources) -> Iterator[Capacity]:
    """Connect to the cluster at `address` or RAY_ADDRESS, or start one on this machine for the block."""
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        check_reachable(address)
        _name_secrets()
    settings = dict(_QUIET)
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        # A token of this cluster's own, in no file: Ray would put one into the home directory.
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if address is None:
        # What Ray does on a laptop with macOS or Windows: a cluster of one machine talks over its loopback alone.
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Nobody reclaims this machine; the watcher is a process of every start of workers.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # The process of an evaluation waits for the next one: its imports take as long as a small benchmark.
        settings["RAY_idle_worker_killing_time_threshold_ms"] = "3600000"
    with short_sockets(os.environ) if address is None else nullcontext(), _environment(settings):
        import ray

        _connect(address, resources)
        try:
            yield _capacity()
        finally:
            ray.shutdown()


def _name_secrets() -> None:
    names = kept_back(os.environ)
    if names:
        sys.stderr.write(
            f"{', '.join(names)}: set here and not passed to the cluster, because Ray would write them into its logs; "
            "its nodes need their own where trials read from such a store\n"
        )


def _connect(address: str | None, resources: Resources) -> None:
    """ray.init; a local cluster gets some chances: Ray gives its own start half a minute, busy machine or not."""
    import ray

    for chance in reversed(range(_CHANCES)):
        try:
            ray.init(**_init_settings(address, resources))
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if address is None and chance:
                continue
            where = "start a Ray cluster on this machine" if address is None else f"use the Ray cluster at {address}"
            raise ConfigError(f"cannot {where}: {token_fault(error) or told(error)}") from error


def _init_settings(address: str | None, resources: Resources) -> dict[str, Any]:
    environment = passed_on(os.environ) | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(resources.cpus_per_worker)))),
        "PYTHONPATH": os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH")])),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        SHIPPED_VARIABLE: "by the sweep",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": _QUIET["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"],
    }
    if not resources.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    shared = {"runtime_env": {"env_vars": environment}, "log_to_driver": False, "logging_level": "error"}
    # A process frees the workers of stopped trials through the dashboard; without an address it would use that of the
    # cluster started last on the machine, which may belong to someone else.
    if address is not None:
        environment["RAY_ADDRESS"] = address
        return {"address": address, **shared}
    port = _free_port()
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    return {
        "address": "local",
        "num_cpus": len(os.sched_getaffinity(0)),
        "object_store_memory": _OBJECT_STORE_BYTES,
        # The dashboard finds and frees the workers of stopped trials; without it they would block the next ones.
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
        **shared,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _capacity() -> Capacity:
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return Capacity(
        tuple(
            Node(node["NodeID"][:8], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in alive
        )
    )


def watch_nodes(sweep_dir: Path, seconds: float) -> list[Any]:
    """Sample every other machine of the cluster into the sweep's directory, as long as the result is kept."""
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
    """Lives on one node and keeps the process that samples it; that one ends with this."""

    def __init__(self, sweep_dir: Path, name: str, seconds: float) -> None:
        from pipeline.tracking.tracker import watch_machine

        self._sampler = watch_machine(sweep_dir, name, seconds)


def run_trials(
    job: TrialJob, names: Sequence[str], *, concurrent: int, asha: Asha | None, steps: int, tick: Callable[[], None]
) -> dict[str, str]:
    """Run the named trials to their ends, `concurrent` at a time; how each ended is in its trial.json.

    Returns {name: reason} of those whose own process was lost, so that it could not write there.

    `tick` is called every moment of Tune's loop; what it raises (Interrupted) ends everything.
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
        param_space={"trial": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrent,
            scheduler=halving,
            reuse_actors=asha is None,
            trial_dirname_creator=_dirname,
        ),
        run_config=tune.RunConfig(
            # New for every call: everything needed to continue is in the run directories.
            name=f"tune-{int(time.time())}",
            storage_path=str(job.sweep_dir / "ray"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=job.resources.retries),  # of the trial's own process
            callbacks=[_ticking(tick)],
        ),
    )
    return {one.config["trial"]: told(one.error) for one in tuner.fit() if one.error and one.config}


def _dirname(trial: Any) -> str:
    return str(trial.config["trial"])


def _ticking(tick: Callable[[], None]) -> Any:
    from ray import tune

    class Tick(tune.Callback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
            tick()

    return Tick()


def _trial(config: Mapping[str, Any], job: TrialJob) -> dict[str, Any]:
    """One trial, in a Tune actor: the training on its workers, then the evaluation as a step of its own."""
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
    except Exception as error:  # noqa: BLE001 - whatever ends a trial is recorded in its state, and the others go on
        state = _note_failure(run_dir, job, error)
    return {"status": state.status}


def _note_failure(run_dir: Path, job: TrialJob, error: BaseException) -> TrialState:
    """Whether a failure is the trial's own, and not the end of the whole cluster, which would also end this process."""
    if failure_of(run_dir) is None:
        time.sleep(_TEARDOWN_SECONDS)
    step = steps_done(run_dir)
    if StopWatch(job.sweep_dir).stop_requested():
        return write_state(run_dir, status="waiting", step=step)
    return write_state(run_dir, status="failed", step=step, error=_reason(run_dir, error))


def _fit(name: str, job: TrialJob) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = job.resources
    each = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        each["GPU"] = resources.gpus_per_worker
    callbacks: list[Any] = []
    if name in job.watched:
        from ray.tune.integration.ray_train import TuneReportCallback

        callbacks.append(TuneReportCallback())
    TorchTrainer(
        partial(_work, name=name, job=job),
        torch_config=TorchConfig(
            backend="nccl" if job.on_gpu else "gloo",
            timeout_s=math.ceil(trial_config(job.sweep_dir, name).train.timeout_s),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers, use_gpu=bool(resources.gpus_per_worker), resources_per_worker=each
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(job.sweep_dir / "ray" / "train"),
            failure_config=ray.train.FailureConfig(max_failures=resources.retries),
            callbacks=callbacks,
        ),
    ).fit()


def _work(name: str, job: TrialJob) -> None:
    """A training worker. Ray has set the launcher's variables and created the process group."""
    _stand_in(job.workdir)
    watch = _Reporting(job.sweep_dir) if name in job.watched else StopWatch(job.sweep_dir)
    train_stage(job.sweep_dir, name, watch)


class _Reporting(StopWatch):
    """Also reports the training loss by our own step, by which trials are compared while they train."""

    def recorded(self, step: int, values: Mapping[str, float]) -> None:
        import ray.train

        ray.train.report({"step": step, "loss": values["train/loss"]})


def _evaluate(name: str, job: TrialJob) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    remote = ray.remote(
        num_cpus=job.resources.eval_cpus,
        num_gpus=job.eval_gpus,
        max_retries=job.resources.retries,
        # Else it would have to fit into the small share of the trial's own process.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )
    ray.get(remote(_evaluate_here).remote(name, job))


def _evaluate_here(name: str, job: TrialJob) -> None:
    _stand_in(job.workdir)
    evaluation_stage(job.sweep_dir, name)


def _stand_in(workdir: Path) -> None:
    """Resolve relative paths of a config against the directory in which the command was started."""
    try:
        os.chdir(workdir)
    except OSError as error:
        raise ConfigError(
            f"{workdir}: {error.strerror} on {os.uname().nodename}; start the sweep in a directory that all nodes share"
        ) from None


def _reason(run_dir: Path, error: BaseException) -> str:
    """Why a trial failed, in a line or two: as written by a rank, else Ray's report on the end of its worker."""
    return failure_of(run_dir) or told(error)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of a block, unless the user has set them."""
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
