"""Models between an untouched and a fine-tuned one: weights W0 + α (W1 − W0), with α the strength of the fine-tuning.

Right for whatever trained, DoRA and full fine-tuning included, because what is mixed are merged weights.
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
from pipeline.model.restore import find_run, load_base, load_run


@dataclass(frozen=True)
class Between:
    """One model that takes any strength; of the weights only those that training moved are held twice more.

    Attributes:
        model: has the strength that was asked for last.
        moved: name -> (W0, W1), on the CPU.
    """

    model: Model
    moved: Mapping[str, tuple[Tensor, Tensor]]

    @staticmethod
    def of(base: Model, tuned: Model) -> Between:
        """Between two merged models of one layout; `tuned` is taken over and changed by `at`.

        What the base does not have, the classifier of a ViT, stays that of `tuned`.
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
        """The model with weights W0 + α (W1 − W0), bit for bit the untouched at 0 and the fine-tuned at 1.

        It is the one model that there is: what an earlier call gave changes with it.
        """
        own = self.model.model.state_dict()
        for name, (start, end) in self.moved.items():
            own[name].copy_(_mixed(start, end, alpha))
        return self.model


def load_at(run_dir: str | Path, alpha: float, step: int | None = None) -> Model:
    """The merged model of a run at a strength in [0, 1]; see `load_run`."""
    tuned = load_run(run_dir, step)
    return tuned if alpha == 1 else Between.of(load_base(find_run(run_dir, step)), tuned).at(alpha)


@torch.no_grad()
def weaken(adapted: nn.Module, base: nn.Module, alpha: float) -> None:
    """Bring a model that still carries its LoRA blocks to a strength in (0, 1].

    The delta of a block is linear in its scale (paper eq. 2), so scaling that by α is exact; what trained outside the
    blocks becomes W0 + α (W1 − W0). A DoRA block is not such a product: ValueError.
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
    # What did not train stays as it is, to the last bit, whatever the rounding in between would do.
    return torch.where(start == end, start, torch.lerp(start, end, alpha))
