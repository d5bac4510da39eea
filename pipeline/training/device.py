"""Batches on the device that trains, copied while it is busy with the step before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")


class Movable(Protocol):
    """Tensors that move to a device together."""

    def to(self, device: torch.device) -> Self:
        """The same on a device, without waiting where memory is pinned."""
        ...

    def tensors(self) -> list[Tensor]:
        """All of them, in a list."""
        ...


M = TypeVar("M", bound=Movable)


def on_device(batches: Iterable[B], inputs: Callable[[B], M], device: torch.device) -> Iterator[tuple[B, M]]:
    """Each batch with its inputs on `device`.

    The host runs ahead of a GPU, so it is here while the GPU computes the step before: a copy on a stream of its own
    then overlaps with that step, where one on the stream of the step would come after it. Elsewhere nothing changes.

    Args:
        batches: with pinned tensors, where the device is a GPU.
        inputs: batch -> what goes to the device.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, inputs(batch).to(device)
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = inputs(batch).to(device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        for each in moved.tensors():
            # Its memory belongs to the copying stream; it must not be given away while the step still reads it.
            each.record_stream(computing)
        yield batch, moved
