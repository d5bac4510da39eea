"""Gates that settle: a block whose gate has been closed for long, and well below the threshold, is shut for good."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import nn

from pipeline.method.adapter import blocks
from pipeline.method.linear import Block


class SettlingState(TypedDict):
    """State in a checkpoint: the settled blocks, and for how many consecutive steps each other one has been closed."""

    settled: list[str]
    closed_for: dict[str, int]


class Settling:
    """Counts the consecutive steps for which each gate has been closed, and shuts the blocks that reach `steps`.

    A step counts if the score is below `threshold - margin`; any other step starts the count again. A settled
    block leaves the graph: its forward is the base layer, it keeps no activation and does not train. All ranks hold the
    same scores and so decide the same. The scores are read on the host once per step, in one transfer.
    """

    def __init__(self, model: nn.Module, steps: int, margin: float) -> None:
        self._steps, self._margin = steps, margin
        self._blocks = {name: block for name, block in blocks(model).items() if block.gate is not None}
        self._closed_for = dict.fromkeys(self._blocks, 0)
        self._settled: list[str] = []

    @property
    def settled(self) -> int:
        """Number of settled blocks."""
        return len(self._settled)

    def observe(self) -> list[Block]:
        """Record one finished step and return the blocks that settle with it, already shut."""
        names = list(self._closed_for)
        for name, is_closed in zip(names, self._below(names), strict=True):
            self._closed_for[name] = self._closed_for[name] + 1 if is_closed else 0
        ready = [name for name in names if self._closed_for[name] >= self._steps]
        self._shut(ready)
        return [self._blocks[name] for name in ready]

    def state(self) -> SettlingState:
        return {"settled": list(self._settled), "closed_for": dict(self._closed_for)}

    def restore(self, state: SettlingState) -> None:
        """Shut the settled blocks and continue the counts."""
        self._closed_for |= {name: count for name, count in state["closed_for"].items() if name in self._blocks}
        self._shut([name for name in state["settled"] if name in self._blocks])

    @torch.no_grad()
    def _below(self, names: list[str]) -> list[bool]:
        gates = [gate for name in names if (gate := self._blocks[name].gate) is not None]
        if not gates:
            return []
        scores = torch.cat([gate.score for gate in gates])
        bounds = torch.tensor([gate.threshold - self._margin for gate in gates], dtype=scores.dtype)
        return (scores < bounds.to(scores.device)).tolist()

    def _shut(self, names: list[str]) -> None:
        for name in names:
            del self._closed_for[name]
            self._settled.append(name)
            self._blocks[name].shut()
