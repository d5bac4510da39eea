"""An exact number of active blocks, or of their parameters: all are open at first, the most useful ones until the end.

The usefulness of block l is a running mean of -dL/dI_l, the straight-through gradient of its indicator (paper eq. 3):
by how much the loss falls, to first order, when the block acts. A closed block has this gradient as well, so it can
return while the number of active blocks still falls. The cubic schedule is that of AdaLoRA (arXiv 2303.10512, eq. 12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from pipeline.method.adapter import blocks
from pipeline.method.gate import Gate
from pipeline.method.linear import Block

# Share of the run with every block open: while B is about zero, the gradient of the indicator says nothing.
WARM = 0.15
# Share of the run, at its end, in which the set of active blocks is fixed, because the open blocks need time to learn.
FIXED = 0.5
# Share of the run that the running mean of the usefulness covers, because the value of a single step is mostly noise.
MEMORY = 1 / 3
# A closed block replaces an open one only if it is more useful by this share of the mean size of all usefulness.
MARGIN = 0.1


class BudgetState(TypedDict):
    """The state of a budget in a checkpoint; all by target name."""

    usefulness: dict[str, float]
    open: list[str]
    dropped_at: dict[str, int]


@dataclass(frozen=True)
class BudgetSchedule:
    """The largest cost of the open blocks after each step of a run of `steps` steps.

    Attributes:
        total: cost of all blocks together: their number, or that of their parameters.
        budget: largest cost at the end.
    """

    total: int
    budget: int
    steps: int

    @property
    def decay(self) -> float:
        """Decay of the running mean of the usefulness, per step."""
        return 1 - 1 / max(1.0, MEMORY * self.steps)

    @property
    def start(self) -> int:
        """Steps with every block open."""
        return int(WARM * self.steps)

    @property
    def end(self) -> int:
        """Step after which the set is fixed; at least one after `start`."""
        return max(self.start + 1, int((1 - FIXED) * self.steps))

    def open_after(self, done: int) -> int:
        """Largest cost of the open blocks after `done` steps."""
        if done <= self.start:
            return self.total
        left = 1 - min(1.0, (done - self.start) / (self.end - self.start))
        return self.budget + int((self.total - self.budget) * left**3)

    def decides(self, done: int) -> bool:
        """Whether the set may change after `done` steps."""
        return self.start < done <= self.end


class BlockBudget:
    """Measures the usefulness of all gated blocks and decides which of them are open.

    Create it before the first backward: it reads the gradients of the scores by hooks, because DeepSpeed clears
    `.grad`. Nothing here trains or writes a score; the caller sets the scores of the gates that `observe` returns.

    Args:
        model: a model with gated blocks.
        budget: number of blocks that stay open, at least 1.
        steps: optimizer steps of the whole run.
        parameters: whether `budget` counts the parameters of the open blocks instead of the blocks.

    Raises:
        ValueError: the model has fewer gated blocks than `budget`, or none; or every block has more parameters.
    """

    def __init__(self, model: nn.Module, budget: int, steps: int, *, parameters: bool = False) -> None:
        gated = {name: block for name, block in sorted(blocks(model).items()) if block.gate is not None}
        self._blocks = gated
        self._gates: dict[str, Gate] = {name: block.gate for name, block in gated.items() if block.gate is not None}
        self._costs = {name: parameters_of(block) if parameters else 1 for name, block in gated.items()}
        total, least = sum(self._costs.values()), min(self._costs.values(), default=0)
        if not gated or not least <= budget <= total:
            name, what = ("budget_parameters", "parameters of all") if parameters else ("budget", "")
            limits = f"between {max(1, least)} and the {total} {what}".rstrip()
            raise ValueError(f"{name}={budget}: must be {limits} gated blocks")
        self.schedule = BudgetSchedule(total, budget, steps)
        self._usefulness: Tensor | None = None
        self._open = set(self._gates)
        self._dropped_at: dict[str, int] = {}
        self._gradients: dict[str, Tensor] = {}
        for name, gate in self._gates.items():
            gate.score.register_post_accumulate_grad_hook(lambda score, name=name: self._note(name, score))

    @property
    def open(self) -> frozenset[str]:
        """Names of the blocks that are open now."""
        return frozenset(self._open)

    def gate(self, name: str) -> Gate:
        """The gate of a block."""
        return self._gates[name]

    def observe(self, done: int, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, bool]:
        """Record the gradients of step `done` and decide which blocks change.

        Args:
            done: optimizer steps finished, this one included.
            mean_over_ranks: gives the mean of an fp32 tensor over all ranks, the same on each of them.

        Returns:
            {target name: open} of the blocks that change; the host reads the device only while the number of open
            blocks falls.
        """
        if done > self.schedule.end:
            return {}
        gradient = torch.stack([self._gradients[name].flatten()[0].float() for name in self._gates])
        latest = -mean_over_ranks(gradient)
        self._usefulness = latest if self._usefulness is None else latest.lerp(self._usefulness, self.schedule.decay)
        if not self.schedule.decides(done):
            return {}
        return self._choose(done, dict(zip(self._gates, self._usefulness.tolist(), strict=True)))

    def _choose(self, done: int, usefulness: Mapping[str, float]) -> dict[str, bool]:
        chosen = most_useful(usefulness, self._open, self.schedule.open_after(done), self._costs)
        changes = dict.fromkeys(self._open - chosen, False) | dict.fromkeys(chosen - self._open, True)
        for name, opens in changes.items():
            if opens:
                self._dropped_at.pop(name, None)
            else:
                self._dropped_at[name] = done
        self._open = chosen
        return dict(sorted(changes.items()))

    def shut_closed(self, done: int) -> list[Block]:
        """Take the closed blocks out of training once the set is fixed; returns the blocks that this call took out."""
        if done < self.schedule.end:
            return []
        shut = [
            block
            for name, block in self._blocks.items()
            if name not in self._open and block.lowrank.lora_A.requires_grad
        ]
        for block in shut:
            block.shut()
        return shut

    def state(self) -> BudgetState:
        """The state from which `restore` continues exactly."""
        values = [0.0] * len(self._gates) if self._usefulness is None else self._usefulness.tolist()
        return {
            "usefulness": dict(zip(self._gates, values, strict=True)),
            "open": sorted(self._open),
            "dropped_at": dict(sorted(self._dropped_at.items())),
        }

    def restore(self, state: BudgetState) -> None:
        """Continue from the state in a checkpoint. The scores themselves are among the checkpoint's parameters."""
        device = next(iter(self._gates.values())).score.device
        self._usefulness = torch.tensor([state["usefulness"][name] for name in self._gates], device=device)
        self._open = set(state["open"])
        self._dropped_at = dict(state["dropped_at"])

    def _note(self, name: str, score: Tensor) -> None:
        if score.grad is not None:
            self._gradients[name] = score.grad.detach().clone()


def most_useful(
    usefulness: Mapping[str, float],
    is_open: set[str] | frozenset[str],
    budget: int,
    costs: Mapping[str, int] | None = None,
) -> set[str]:
    """The blocks that are most useful for their cost, as many as the budget allows; ties by name.

    Args:
        usefulness: {target name: by how much the loss falls when the block acts}.
        is_open: the blocks that are open now, favoured by a margin.
        budget: largest cost of the chosen blocks together.
        costs: {target name: cost}; None: 1 each.
    """
    paid = dict.fromkeys(usefulness, 1) if costs is None else costs
    worth = {name: value / paid[name] for name, value in usefulness.items()}
    margin = MARGIN * sum(abs(value) for value in worth.values()) / len(worth)
    ranked: Sequence[str] = sorted(worth, key=lambda name: (-worth[name] - (margin if name in is_open else 0.0), name))
    chosen: set[str] = set()
    for name in ranked:
        if paid[name] <= budget:
            chosen.add(name)
            budget -= paid[name]
    return chosen


def parameters_of(block: Block) -> int:
    """Number of parameters of a block: A, B, the score of its gate and DoRA's magnitude."""
    return sum(parameter.numel() for parameter in (*block.lowrank.parameters(), *block.undecayed()))


def blocks_of_budget(budget: float, blocks: int) -> int:
    """`gate.budget` as a number of blocks: from 1 on it is a count, below 1 a share of all blocks, at least one."""
    return int(budget) if budget >= 1 else max(1, round(budget * blocks))
