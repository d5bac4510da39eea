"""The training loop: everything it needs is built before it and handed in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.method.adapter import GradientWatch
from pipeline.training.cluster.distributed import any_rank
from pipeline.training.engine import set_learning_rates
from pipeline.training.monitor import Monitor


class StopRequest:
    """True after the first SIGTERM, SIGUSR1 or Ctrl-C, or when `asked` says so: the loop then saves and leaves."""

    def __init__(self, asked: Callable[[], bool] | None = None) -> None:
        self._asked = asked
        self._noted = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._noted or (self._asked is not None and self._asked())

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # Ray Train runs the training beside its own main thread, and only that one gets signals
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


def train_steps(
    engine: Any,
    batches: Iterable[Any],
    *,
    targets_of: Callable[[Any], Tensor],
    factor: Callable[[int], float],
    peak_lr: float,
    seed: int,
    gradients: GradientWatch,
    settle: Callable[[], None],
    monitor: Monitor,
    save: Callable[[int], None],
    checkpoint_every: int,
    total_steps: int,
    stop: StopRequest,
    control: dist.ProcessGroup,
) -> int:
    """Train over `batches`, which start at the step to be done next; return the number of steps done in all.

    `targets_of(batch)` is what the task wants of a batch beside its images. `settle()` is called after each step,
    `save(step)` with the number of finished steps: at intervals, at the end, and when a stop is requested.
    """
    done, watching = 0, True
    for batch in batches:
        step = batch.step
        # Any random draw inside the model follows from seed, step and rank: a resumed run needs no generator state.
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + dist.get_rank())
        set_learning_rates(engine, factor(step))
        images = batch.images.to(engine.device, non_blocking=True)
        targets = targets_of(batch).to(engine.device, non_blocking=True)
        losses = engine(images, targets, step)
        engine.backward(losses["total"])
        engine.step()
        if watching:  # after the step, when ZeRO-3 has put the scores together again
            _check(gradients)
            watching = False
        settle()
        done = step + 1
        monitor.after_step(batch, losses, factor(step), peak_lr)
        stopping = any_rank(stop.requested, control)
        if done % checkpoint_every == 0 or done == total_steps or stopping:
            monitor.check_finite()
            save(done)
        if stopping:
            break
    return done


def _check(gradients: GradientWatch) -> None:
    try:
        gradients.check()
    except ValueError as error:
        raise ConfigError(f"after the first backward pass {error}; take them out of adapter.targets") from error
