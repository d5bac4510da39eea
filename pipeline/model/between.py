"""Models between an untouched and a fine-tuned one: weights W0 + α (W1 − W0), with α the strength of the fine-tuning.

Merged weights are mixed, so this is right for every kind of training, DoRA and full fine-tuning included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.method.adapter import blocks
from pipeline.method.linear import LoRALinear
from pipeline.model.load import Model
from pipeline.model.restore import find_run, load_both, load_run


@dataclass(frozen=True)
class Between:
    """One model that can be set to any strength; only weights that training changed are held in two further copies.

    Attributes:
        model: the model at the strength of the latest call.
        moved: name -> (W0, W1), on the CPU.
    """

    model: Model
    moved: Mapping[str, tuple[Tensor, Tensor]]

    @staticmethod
    def of(base: Model, tuned: Model) -> Between:
        """Between two merged models of one layout; `tuned` is taken over and changed by `at`.

        The classifier of a ViT, which the base does not have, stays that of `tuned`.
        """
        start = base.model.state_dict()
        moved = {
            name: (start[name].detach().cpu(), end.detach().cpu().clone())
            for name, end in tuned.model.state_dict().items()
            if name in start and not torch.equal(start[name].cpu(), end.cpu())
        }
        return Between(tuned, moved)

    @torch.no_grad()
    def at(self, alpha: float) -> Model:
        """The model with weights W0 + α (W1 − W0), bit for bit the untouched one at 0 and the fine-tuned one at 1.

        There is only one model: the result of an earlier call changes with this one.
        """
        own = self.model.model.state_dict()
        for name, (start, end) in self.moved.items():
            own[name].copy_(_mixed(start, end, alpha))
        return self.model


def load_at(run_dir: str | Path, alpha: float, step: int | None = None) -> Model:
    """The merged model of a run at a strength in [0, 1]; see `load_run`."""
    return load_run(run_dir, step) if alpha == 1 else Between.of(*load_both(find_run(run_dir, step))).at(alpha)


@torch.no_grad()
def weaken(adapted: nn.Module, base: nn.Module, alpha: float) -> None:
    """Bring a model that still carries its LoRA blocks to a strength in (0, 1].

    The delta of a block is linear in its scale (paper eq. 2), so multiplying the scale by α is exact; weights trained
    outside the blocks become W0 + α (W1 − W0). DoRA blocks are not linear in their scale and raise a ValueError.
    """
    if alpha == 1:
        return
    for target, block in blocks(adapted).items():
        if not isinstance(block, LoRALinear):
            raise ValueError(f"{target}: only a LoRA block can be scaled")
        block.lowrank.scaling *= alpha
    start = base.state_dict()
    for name, value in adapted.state_dict().items():
        if name in start:
            value.copy_(_mixed(start[name], value, alpha))


def _mixed(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    if not start.is_floating_point():
        return end if alpha >= 0.5 else start
    # Weights that did not train stay as they are to the last bit, whatever the rounding would do.
    return torch.where(start == end, start, torch.lerp(start, end, alpha))
