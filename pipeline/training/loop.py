"""The training loop; build.py builds everything that it needs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.reference.samples import Reference
from pipeline.training.cluster.distributed import AnyRank
from pipeline.training.device import on_device
from pipeline.training.engine import set_learning_rates


class StopRequest:
    """True after the first SIGTERM, SIGUSR1 or Ctrl-C, or when `also` returns True: the loop then saves and ends."""

    def __init__(self, also: Callable[[], bool] | None = None) -> None:
        self._also = also
        self._noted = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._noted or (self._also is not None and self._also())

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread gets signals
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted = True
        # A second Ctrl-C of a user ends the run at once. A launcher merely repeats the scheduler's signal.
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])


class Inputs(NamedTuple):
    """The parts of a batch that the objective reads (see `Objective.forward`)."""

    images: Tensor
    targets: Tensor
    reference: Reference | None = None
    labels: Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        """The same on a device, without waiting if the memory is pinned."""

        def there(each: Tensor) -> Tensor:
            return each.to(device, non_blocking=True)

        reference = None if self.reference is None else Reference(*map(there, self.reference))
        labels = None if self.labels is None else there(self.labels)
        return Inputs(there(self.images), there(self.targets), reference, labels)

    def tensors(self) -> list[Tensor]:
        """All of them, in a list."""
        return [self.images, self.targets, *(self.reference or ()), *([] if self.labels is None else [self.labels])]


@dataclass(frozen=True)
class Step:
    """One finished optimizer step.

    Attributes:
        batch: the batch of this rank.
        losses: scalars of this rank, by name.
        lr_factor: factor of the peak learning rates.
    """

    batch: Any
    losses: dict[str, Tensor]
    lr_factor: float

    @property
    def done(self) -> int:
        """Optimizer steps finished, this one included."""
        return self.batch.step + 1


@dataclass(frozen=True)
class Training:
    """A run that is ready to train.

    Attributes:
        engine: the objective inside DeepSpeed.
        batches: this rank's batches, from the next step on.
        inputs: batch -> its inputs for the objective.
        schedule: step -> factor of the peak learning rates.
        after_step: called in this order after each optimizer step.
        save: writes a checkpoint of the given number of finished steps; the last one of this job is on the disk when
            it returns; collective.
        close: waits for a checkpoint that is being written.
        checkpoint_every: steps between two checkpoints; the last step always has one.
        total_steps: length of the schedule.
        seed: seed of random draws inside the model.
        control: gloo group for messages between ranks.
    """

    engine: Any
    batches: Iterable[Any]
    inputs: Callable[[Any], Inputs]
    schedule: Callable[[int], float]
    after_step: Sequence[Callable[[Step], None]]
    save: Callable[[int, bool], None]
    close: Callable[[], None]
    checkpoint_every: int
    total_steps: int
    seed: int
    control: dist.ProcessGroup


def train_steps(training: Training, stop: StopRequest) -> int:
    """Train until the batches end or a stop is requested on any rank, which the others notice one step later.

    Returns:
        The number of optimizer steps finished in all; a checkpoint holds them.
    """
    engine, done, stops = training.engine, 0, AnyRank(training.control)
    for batch, inputs in on_device(training.batches, training.inputs, engine.device):
        # Random draws inside the model follow from seed, step and rank, so a resumed run needs no generator state.
        torch.manual_seed((training.seed * 1_000_003 + batch.step) * 4096 + dist.get_rank())
        factor = training.schedule(batch.step)
        set_learning_rates(engine, factor)
        losses = engine(inputs.images, inputs.targets, batch.step, inputs.reference, inputs.labels)
        engine.backward(losses["total"])
        engine.step()
        step = Step(batch, losses, factor)
        for hook in training.after_step:
            hook(step)
        done = step.done
        stopping = stops.answer()
        if done % training.checkpoint_every == 0 or done == training.total_steps or stopping:
            training.save(done, stopping or done == training.total_steps)
        if stopping:
            break
        if done < training.total_steps:
            stops.ask(stop.requested)
    return done
