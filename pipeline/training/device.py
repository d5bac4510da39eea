"""Copies of batches to the device while it computes the previous step, and of tensors back to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")
# Elements copied to the host at once: 256 MB of fp32.
AT_ONCE = 64 * 2**20


class Movable(Protocol):
    """Tensors that move to a device together."""

    def to(self, device: torch.device) -> Self:
        """The same on a device, without waiting if the memory is pinned."""
        ...

    def tensors(self) -> list[Tensor]:
        """All of them, in a list."""
        ...


M = TypeVar("M", bound=Movable)


def on_device(batches: Iterable[B], inputs: Callable[[B], M], device: torch.device) -> Iterator[tuple[B, M]]:
    """Each batch with its inputs on `device`.

    The host runs ahead of a GPU, so it gets here while the GPU computes the previous step: a copy on its own stream
    then overlaps with that step, while one on the step's stream would wait for it. Other devices are not affected.

    Args:
        batches: batches, with pinned tensors if the device is a GPU.
        inputs: batch -> the part that goes to the device.
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
            # Its memory belongs to the copying stream; it must not be reused while the step still reads it.
            each.record_stream(computing)
        yield batch, moved


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU, by one transfer for `AT_ONCE` elements of them."""
    found: dict[str, Tensor] = {}
    for names in portions({name: tensor.numel() for name, tensor in tensors.items()}):
        flat = torch.cat([tensors[name].detach().flatten() for name in names]).cpu()
        parts = flat.split([tensors[name].numel() for name in names])
        found |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return found


def portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, in groups of about `AT_ONCE` elements."""
    group: list[str] = []
    room = AT_ONCE
    for name, size in sizes.items():
        if group and size > room:
            yield group
            group, room = [], AT_ONCE
        group.append(name)
        room -= size
    if group:
        yield group
