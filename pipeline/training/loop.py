"""The training loop: everything it needs is built before it (build.py) and handed in."""

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
            return self  # Ray Train trains in a thread of its own, and only the main thread gets signals
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted = True
        # A user who presses Ctrl-C twice means it. A launcher repeats what the scheduler has sent already.
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])


class Inputs(NamedTuple):
    """What the objective takes of a batch (see `Objective.forward`)."""

    images: Tensor
    targets: Tensor
    reference: Reference | None = None
    labels: Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        """The same on a device, without waiting where memory is pinned."""

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
        batch: what this rank trained on.
        losses: scalars of this rank, by name.
        lr_factor: what the peak learning rates were multiplied by.
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
    """A run that is ready to go.

    Attributes:
        engine: the objective inside DeepSpeed.
        batches: this rank's batches, from the step to be done next.
        inputs: batch -> what the objective takes of it.
        schedule: step -> factor of the peak learning rates.
        after_step: called in this order after each optimizer step.
        save: writes a checkpoint of the given number of finished steps, and where it is the last one of this job
            returns when it is on the disk; collective.
        close: lets a checkpoint that is being written end.
        checkpoint_every: steps between two checkpoints; the last step always has one.
        total_steps: length of the schedule.
        seed: of any random draw inside the model.
        control: group for messages between ranks.
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
    """Train until the batches end or a stop is requested on any rank; the others learn of it one step later.

    Returns:
        The number of optimizer steps finished in all; a checkpoint holds them.
    """
    engine, done, stops = training.engine, 0, AnyRank(training.control)
    for batch, inputs in on_device(training.batches, training.inputs, engine.device):
        # Any random draw inside the model follows from seed, step and rank: a resumed run needs no generator state.
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
