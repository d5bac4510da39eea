"""Parameter groups and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

# Weight decay must not shrink these: scores are moved by the penalty only, and magnitudes are norms, not weights.
_NO_DECAY = ("gate.score", "magnitude", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates: `base` for adapters and layers, `rest` outside the layers, `gate` for scores."""

    base: float
    rest: float
    gate: float


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], inside_layers: Callable[[str], bool], rates: Rates, weight_decay: float
) -> list[dict]:
    """Sort trainable parameters into optimizer groups; empty groups are left out.

    Each group carries its peak rate as `peak_lr`; `lr` starts at zero and is set before every step.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        peak = rates.gate if name.endswith("gate.score") else rates.base if inside_layers(name) else rates.rest
        decay = 0.0 if name.endswith(_NO_DECAY) else weight_decay
        group = groups.setdefault(
            (peak, decay), {"params": [], "names": [], "peak_lr": peak, "lr": 0.0, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def lr_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine to zero: the factor of step `step` in [0, total_steps) (FLYP's schedule)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
