"""The protocol: one process, one thread, CPU seconds, variants alternated, medians of ratios within a round.

Elapsed time says nothing on a shared machine; CPU seconds of variants that take turns do, to about 5 %. Freed memory
stays in the process for every variant alike, or elementwise operations would pay for fresh pages.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.training.cluster.distributed import read_world, set_heap


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a ratio over the rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Line:
    """One figure against its target (None: shown beside another). `at_least`: bigger is better."""

    row: int
    name: str
    what: str
    value: Ratio
    target: float | None
    at_least: bool
    limit: str
    note: str = ""
    load: float = 0.0

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value.value >= self.target if self.at_least else self.value.value <= self.target


@dataclass
class Times:
    """CPU seconds of each variant, round by round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, over: str, under: str) -> Ratio:
        """seconds of `over` divided by those of `under`: how many times slower the first is."""
        return spread([a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)])

    def median(self, name: str) -> float:
        return median(self.seconds[name])


def spread(values: list[float]) -> Ratio:
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4)
    return Ratio(median(values), low, high)


def prepare() -> None:
    torch.set_num_threads(1)
    set_heap(read_world(), keep=True)


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> Times:
    """Run every variant once a round, in an order that turns each round; the first round warms up and is dropped."""
    times = Times({name: [] for name in variants})
    names = list(variants)
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            spent = clock(variants[name])
            if turn:
                times.seconds[name].append(spent)
    return times


def cpu_seconds_with_workers(call: Callable[[], object]) -> float:
    """CPU seconds of this process and of the processes that it started and that have ended since."""
    start = _used()
    call()
    gc.collect()  # a DataLoader waits for its workers when its iterator goes
    return _used() - start


def _used() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))


def flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in it."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # or a freed address could be counted as one seen before

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(found.values())
