"""Parameter groups and the schedule of FLYP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.training.optim import Rates, lr_factor, parameter_groups


def test_the_schedule_is_linear_then_half_a_cosine() -> None:
    warmup, total = 500, 25_030
    assert lr_factor(0, warmup, total) == pytest.approx(1 / 500)
    assert lr_factor(499, warmup, total) == 1.0
    assert lr_factor(500, warmup, total) == 1.0
    assert lr_factor((500 + 25_030) // 2, warmup, total) == pytest.approx(0.5, abs=1e-4)
    assert lr_factor(total - 1, warmup, total) < 1e-7
    # A score can travel the sum of the rates: 0.125 in the paper's run at 1e-5.
    assert sum(1e-5 * lr_factor(step, warmup, total) for step in range(total)) == pytest.approx(0.1252, abs=2e-4)


def test_every_parameter_is_in_one_group() -> None:
    """Every parameter falls into one group with its rate and decay."""
    names = {
        "visual.transformer.resblocks.0.attn.q_proj.lowrank.lora_A": (1.0, 0.1),
        "visual.transformer.resblocks.0.attn.q_proj.magnitude": (1.0, 0.0),
        "visual.transformer.resblocks.0.attn.q_proj.gate.score": (3.0, 0.0),
        "visual.proj": (2.0, 0.1),
        "logit_scale": (2.0, 0.0),
    }
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in names}
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    groups = parameter_groups(
        [*parameters.items(), ("visual.transformer.resblocks.0.attn.q_proj.base.weight", frozen)],
        lambda name: "resblocks" in name,
        Rates(base=1.0, rest=2.0, gate=3.0),
        weight_decay=0.1,
    )
    found = {name: (group["peak_lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found == names
    assert all(group["params"] for group in groups)
    assert all(group["lr"] == 0.0 for group in groups)


def test_the_factor_never_leaves_zero_to_one() -> None:
    factors = [lr_factor(step, 3, 10) for step in range(10)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert not any(math.isnan(factor) for factor in factors)
