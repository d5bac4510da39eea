"""The plan of a sweep before it starts: trials, waves, workers, steps, hours, disk, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import ConfigError
from pipeline.display import size, text_table
from pipeline.tuning.grid import Resources, Trial

_EPSILON = 1e-9


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Capacity:
    """The machines of the cluster at this moment."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def processes(self, cpus: float, gpus: float) -> int:
        """Number of processes of this size that fit at a time, each on one machine."""
        return sum(_fit(node, cpus, gpus) for node in self.nodes)

    def __str__(self) -> str:
        nodes = ", ".join(f"{node.name}: {node.cpus:g} CPUs {node.gpus:g} GPUs" for node in self.nodes)
        return f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''} ({nodes})"


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, and where that number comes from."""

    seconds_per_step: float
    source: str


@dataclass(frozen=True)
class Plan:
    """The remaining work. Hours are those of reserved cores and GPUs, None until a step has been measured."""

    trials: int
    done: int
    concurrent: int
    resources: Resources
    capacity: Capacity
    steps: int
    speed: Speed | None
    disk_bytes: int | None = None

    @property
    def waves(self) -> int:
        return math.ceil((self.trials - self.done) / self.concurrent) if self.trials > self.done else 0

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all trainings one after another."""
        return None if self.speed is None else self.steps * self.speed.seconds_per_step

    @property
    def cpu_hours(self) -> float | None:
        seconds = self.training_seconds
        return None if seconds is None else seconds * self.resources.workers * self.resources.cpus_per_worker / 3600

    @property
    def gpu_hours(self) -> float | None:
        seconds = self.training_seconds
        return None if seconds is None else seconds * self.resources.workers * self.resources.gpus_per_worker / 3600


def make_plan(
    trials: Sequence[Trial],
    steps: Mapping[str, int],
    resources: Resources,
    capacity: Capacity,
    *,
    speed: Speed | None = None,
) -> Plan:
    """The plan of the remaining work.

    Args:
        trials: all of the sweep.
        steps: {name: optimizer steps left} of those that are not over.

    Raises:
        ConfigError: a trial that cannot fit the cluster, with what it needs and what there is.
    """
    faults = fitting_faults(trials, resources, capacity)
    if faults:
        raise ConfigError("\n".join(faults))
    return Plan(
        trials=len(trials),
        done=len(trials) - len(steps),
        concurrent=concurrency(resources, capacity, max(1, len(steps))),
        resources=resources,
        capacity=capacity,
        steps=sum(steps.values()),
        speed=speed,
    )


def concurrency(resources: Resources, capacity: Capacity, trials: int) -> int:
    """Number of trials at a time: as many as fit, at most the remaining ones and the allowed number."""
    fit = capacity.processes(resources.cpus_per_worker, resources.gpus_per_worker) // resources.workers
    return max(1, min(fit, trials, resources.concurrent or trials))


def fitting_faults(trials: Sequence[Trial], resources: Resources, capacity: Capacity) -> list[str]:
    """Why the sweep's trials cannot run on this cluster; empty when they can."""
    faults = []
    fit = capacity.processes(resources.cpus_per_worker, resources.gpus_per_worker)
    if fit < resources.workers:
        faults.append(
            f"resources: a trial needs {resources.workers} workers with {_size(resources)} each, "
            f"and the cluster has room for {fit}: {capacity}"
        )
    evaluation = resources.gpus_per_worker if resources.eval_gpus is None else resources.eval_gpus
    if not capacity.processes(resources.eval_cpus, evaluation):
        faults.append(
            f"resources.eval_cpus, eval_gpus: an evaluation needs {resources.eval_cpus:g} CPUs and {evaluation:g} GPUs "
            f"on one node, and there is none such: {capacity}"
        )
    if faults:
        faults.append("lower them in section resources of the grid file, or name a larger cluster with --address")
    for trial in trials:
        batch, streams = trial.config.train.global_batch_size, trial.config.data.streams
        for key, value in (("train.global_batch_size", batch), ("data.streams", streams)):
            if value % resources.workers:
                faults.append(f"{trial.name}: {key}: {value} cannot be shared by {resources.workers} workers")
    return faults


def describe_plan(plan: Plan) -> str:
    """The plan as text for the terminal."""
    resources, each = plan.resources, _size(plan.resources)
    lines = [
        ("trials", f"{plan.trials}" + (f", {plan.done} of them over" if plan.done else "")),
        ("waves", f"{plan.waves} of {plan.concurrent} trial{'s' if plan.concurrent > 1 else ''} at a time"),
        ("workers", f"{resources.workers} per trial, {each} each"),
        ("cluster", str(plan.capacity)),
        ("steps", f"{plan.steps:,} to go"),
        ("time", _time_text(plan)),
    ]
    if plan.capacity.gpus and not resources.gpus_per_worker:
        lines.append(("GPUs", f"none of the {plan.capacity.gpus:g} are used: set resources.gpus_per_worker=1"))
    if plan.disk_bytes is not None:
        lines.append(("disk", f"about {size(plan.disk_bytes)} for checkpoints"))
    return text_table((), lines, left=2)


def _time_text(plan: Plan) -> str:
    seconds = plan.training_seconds
    if seconds is None or plan.speed is None:
        return "not known: no run here has measured a step yet; give --seconds-per-step"
    wall = seconds / plan.concurrent
    hours = f"{plan.gpu_hours:.3g} GPU-hours" if plan.resources.gpus_per_worker else f"{plan.cpu_hours:.3g} CPU-hours"
    speed = f"{plan.speed.seconds_per_step:.3g} s a step, {plan.speed.source}"
    return f"{hours}, about {wall / 3600:.2g} h of training ({speed}); evaluation comes on top"


def _fit(node: Node, cpus: float, gpus: float) -> int:
    by_cpu = math.floor(node.cpus / cpus + _EPSILON) if cpus else math.inf
    by_gpu = math.floor(node.gpus / gpus + _EPSILON) if gpus else math.inf
    if 0 < gpus < 1:  # a share of one card: the rest of a card that holds no whole share is lost
        by_gpu = math.floor(node.gpus) * math.floor(1 / gpus + _EPSILON)
    return int(min(by_cpu, by_gpu))


def _size(resources: Resources) -> str:
    gpus = f" and {resources.gpus_per_worker:g} GPUs" if resources.gpus_per_worker else ""
    return f"{resources.cpus_per_worker:g} CPU{'s' if resources.cpus_per_worker != 1 else ''}{gpus}"
