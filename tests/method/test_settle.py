"""Gates that settle."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.gate import read_gates
from pipeline.method.settle import Settling


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    attach_adapter({name: (net, name) for name in ("0", "2", "4")}, rank=2, kind="dora")
    return net


def put(net: nn.Module, **scores: float) -> None:
    for name, score in scores.items():
        gate = blocks(net)[name.removeprefix("b")].gate
        assert gate is not None
        with torch.no_grad():
            gate.score.fill_(score)


def test_only_a_gate_long_below_the_threshold_settles() -> None:
    """Only a gate far below the threshold for steps in a row settles."""
    net = network()
    settling = Settling(net, steps=3, margin=0.02)
    put(net, b0=0.07, b2=0.09, b4=0.07)  # threshold 0.1: 2 is closed, but not by the margin
    assert settling.observe() == settling.observe() == []
    put(net, b4=0.12)
    assert [block.target for block in settling.observe()] == ["0"]
    put(net, b4=0.07)
    assert settling.observe() == settling.observe() == []
    assert [block.target for block in settling.observe()] == ["4"]
    assert settling.settled == 2
    put(net, b0=0.5)
    assert settling.observe() == []


def test_a_settled_block_is_the_base_and_does_not_train() -> None:
    """A settled block is the base alone and nothing of it trains."""
    net = network()
    settling = Settling(net, steps=1, margin=0.02)
    put(net, b2=0.0)
    (block,) = settling.observe()
    assert not any(parameter.requires_grad for parameter in block.parameters())
    read_gates([each.gate for each in blocks(net).values() if each.gate is not None])
    net(torch.randn(5, 6)).square().sum().backward()
    assert all(parameter.grad is None for parameter in block.parameters())
    others = [each for each in blocks(net).values() if each is not block]
    assert all(each.lowrank.lora_B.grad is not None and each.lowrank.lora_B.grad.any() for each in others)


def test_a_restored_count_goes_on_where_it_stood() -> None:
    net, other = network(), network()
    settling = Settling(net, steps=3, margin=0.02)
    put(net, b0=0.0)
    for _ in range(2):
        settling.observe()
    put(net, b4=0.0)
    settling.observe()
    restored = Settling(other, steps=3, margin=0.02)
    restored.restore(settling.state())
    put(other, b0=0.0, b4=0.0)
    assert restored.settled == 1
    assert not blocks(other)["0"].lowrank.lora_A.requires_grad
    assert restored.observe() == []
    assert [block.target for block in restored.observe()] == ["4"]
    assert restored.state() == {"settled": ["0", "4"], "closed_for": {"2": 0}}
