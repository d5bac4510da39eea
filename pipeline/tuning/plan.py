"""The plan of a sweep before it starts: trials, waves, workers, steps, hours, disk, and whether it fits the cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Config, ConfigError
from pipeline.display import size, text_table
from pipeline.tuning.grid import Resources
from pipeline.tuning.trials import Trial

if TYPE_CHECKING:
    from pipeline.model.load import Model

_EPSILON = 1e-9
# fp32 weights and moments of the trained parameters: two moments for Adam, one for SGD.
_BYTES_PER_PARAMETER = {"adamw": 12, "sgd": 8}


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
    """Seconds of one optimizer step, and the source of this number."""

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
    to_come: int = 0  # trials that a sampler has yet to propose; they count in all other numbers
    steps_to_come: int = 0  # steps of each of them, if known
    drift: float | None = None  # the largest drift of a finished trial that kept the floor, as a hint for max_drift
    absent: tuple[str, ...] = ()  # requirements of the sweep that this machine lacks

    @property
    def waves(self) -> int:
        return math.ceil((self.trials - self.done) / self.concurrent) if self.trials > self.done else 0

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all trainings, one after another."""
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
    to_come: int = 0,
    each: int = 0,
) -> Plan:
    """The plan of the remaining work, whether or not it fits the cluster (`room_faults`).

    Args:
        trials: all trials of the sweep.
        steps: {name: optimizer steps left} of the trials that are not over.
        to_come: number of trials that a sampler has yet to propose.
        each: steps of each of these.

    Raises:
        ConfigError: the workers of a trial cannot share its batch or its streams.
    """
    if faults := sharing_faults(trials, resources):
        raise ConfigError("\n".join(faults))
    return Plan(
        trials=len(trials) + to_come,
        done=len(trials) - len(steps),
        concurrent=concurrency(resources, capacity, max(1, len(steps) + to_come)),
        resources=resources,
        capacity=capacity,
        steps=sum(steps.values()) + to_come * each,
        speed=speed,
        to_come=to_come,
        steps_to_come=each if to_come else 0,
    )


def concurrency(resources: Resources, capacity: Capacity, trials: int) -> int:
    """Number of trials at a time: as many as fit, but no more than remain or are allowed."""
    fit = capacity.processes(resources.cpus_per_worker, resources.gpus_per_worker) // resources.workers
    return max(1, min(fit, trials, resources.concurrent or trials))


def room_faults(resources: Resources, capacity: Capacity) -> list[str]:
    """Why no trial fits this cluster, with its needs and the cluster's resources; empty if one does."""
    faults = []
    fit = capacity.processes(resources.cpus_per_worker, resources.gpus_per_worker)
    if fit < resources.workers:
        faults.append(
            f"resources: a trial needs {_number(resources.workers, 'worker')} with {_size(resources)} each, "
            f"and {fit} fit this cluster: {capacity}"
        )
    evaluation = resources.gpus_per_worker if resources.eval_gpus is None else resources.eval_gpus
    if not capacity.processes(resources.eval_cpus, evaluation):
        faults.append(
            f"resources.eval_cpus, eval_gpus: an evaluation needs {_number(resources.eval_cpus, 'CPU')} and "
            f"{_number(evaluation, 'GPU')} on one node, and no node has them: {capacity}"
        )
    if faults:
        faults.append("lower them in section resources of the grid file, or name a larger cluster with --address")
    return faults


def sharing_faults(trials: Sequence[Trial], resources: Resources) -> list[str]:
    """Why the workers of a trial cannot share its work evenly."""
    faults = []
    for trial in trials:
        batch, streams = trial.config.train.global_batch_size, trial.config.data.streams
        for key, value in (("train.global_batch_size", batch), ("data.streams", streams)):
            if value % resources.workers:
                faults.append(f"{trial.name}: {key}: {value} cannot be shared by {resources.workers} workers")
    return faults


def describe_plan(plan: Plan) -> str:
    """The plan as text for the terminal."""
    resources, each = plan.resources, _size(plan.resources)
    proposed = f", {plan.to_come} of them still to be proposed" if plan.to_come else ""
    lines = [
        ("trials", f"{plan.trials}" + (f", {plan.done} of them over" if plan.done else "") + proposed),
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
    if plan.drift is not None:
        lines.append(("drift", f"up to {plan.drift:.3g} in finished trials that kept the floor; see max_drift"))
    lines += [("not here", text) for text in plan.absent]
    return text_table((), lines, left=2)


def _time_text(plan: Plan) -> str:
    seconds = plan.training_seconds
    if seconds is None or plan.speed is None:
        return "not known: no run here has measured a step yet"
    wall = seconds / plan.concurrent
    hours = f"{plan.gpu_hours:.3g} GPU-hours" if plan.resources.gpus_per_worker else f"{plan.cpu_hours:.3g} CPU-hours"
    speed = f"{plan.speed.seconds_per_step:.3g} s a step, {plan.speed.source}"
    return f"{hours}, about {wall / 3600:.2g} h of training ({speed}); evaluation comes on top"


def _fit(node: Node, cpus: float, gpus: float) -> int:
    by_cpu = math.floor(node.cpus / cpus + _EPSILON) if cpus else math.inf
    by_gpu = math.floor(node.gpus / gpus + _EPSILON) if gpus else math.inf
    if 0 < gpus < 1:  # shares of a card: a remainder smaller than a share is lost
        by_gpu = math.floor(node.gpus) * math.floor(1 / gpus + _EPSILON)
    return int(min(by_cpu, by_gpu))


def _size(resources: Resources) -> str:
    gpus = f" and {_number(resources.gpus_per_worker, 'GPU')}" if resources.gpus_per_worker else ""
    return _number(resources.cpus_per_worker, "CPU") + gpus


def _number(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def checkpoint_bytes(trials: Sequence[Trial], parameters: Mapping[str, int]) -> int:
    """Largest size of the checkpoints of all trials; while one is written there is one more than keep_last."""
    settings = ((parameters[one.name], one.config.train) for one in trials)
    return sum(count * _BYTES_PER_PARAMETER[train.optimizer] * (train.keep_last + 1) for count, train in settings)


def trained_parameters(trials: Sequence[Trial], also: Sequence[Config] = ()) -> dict[str, int]:
    """{trial: number of trained parameters}. Builds each base model once, a CLIP without values.

    A ViT's classifier does not count, because its size depends on the shards.

    Raises:
        ConfigError: the model has no such blocks, or a budget does not fit them; also for a config of `also`.
    """
    from pipeline.model.load import load_model
    from pipeline.model.vit import untagged

    bases: dict[str, Model] = {}

    def count(config: Config) -> int:
        name = config.model.name
        if name not in bases:
            bases[name] = load_model(untagged(name), hollow=True)
        return _count(bases[name], config)

    for config in also:
        count(config)
    return {trial.name: count(trial.config) for trial in trials}


def _count(model: Model, config: Config) -> int:
    """r (inputs + outputs) per block, 1 per gate, `outputs` for DoRA's magnitude, and other trained parameters."""
    from pipeline.costs.cost import trained_parameters as outside_blocks
    from pipeline.model.towers import adapter_targets
    from pipeline.training.model import chosen_targets

    adapter = config.adapter
    total = outside_blocks(model, config.train.train_rest, adapter.kind)
    if adapter.kind in ("full", "none"):
        return total
    targets = adapter_targets(model.model)
    try:
        names = chosen_targets(config, list(targets))
    except ValueError as error:
        raise ConfigError(f"{config.name}: adapter.{error}") from error
    sizes = []
    for name in names:
        module, attribute = targets[name]
        linear = getattr(module, attribute)
        size = adapter.rank * (linear.in_features + linear.out_features) + config.gated
        sizes.append(size + (linear.out_features if adapter.kind == "dora" else 0))
    _check_budget(config, sizes)
    return total + sum(sizes)


def _check_budget(config: Config, sizes: Sequence[int]) -> None:
    """Raise ConfigError if a budget exceeds the gated blocks, whose parameters are `sizes`, or pays for none."""
    gate = config.gate
    if not config.gated:
        return
    if gate.budget is not None and gate.budget > len(sizes):
        limits, name, value = f"1 and the {len(sizes)} gated blocks", "budget", gate.budget
    elif gate.budget_parameters is not None and not min(sizes) <= gate.budget_parameters <= sum(sizes):
        limits, value = f"{min(sizes)} and the {sum(sizes)} parameters of all gated blocks", gate.budget_parameters
        name = "budget_parameters"
    else:
        return
    raise ConfigError(f"{config.name}: gate.{name}={value:g}: must be between {limits}")
