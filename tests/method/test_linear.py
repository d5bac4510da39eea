"""Blocks against formulas written out by hand, in a small network."""

from copy import deepcopy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from pipeline.method.adapter import AdapterKind, attach_adapter, blocks, merge_adapter
from pipeline.method.linear import Block, DoRALinear

KINDS: list[AdapterKind] = ["lora", "dora"]
OPEN, CLOSED = 0.15, 0.05


def network(
    kind: AdapterKind, score: float | None = OPEN, bias: bool = True, alpha: float | None = 6.0
) -> nn.Sequential:
    """Three linears with tanh between; the middle one is a block with a trained (non-zero) adapter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4))
    attach_adapter({"middle": (net, "2")}, rank=3, kind=kind, alpha=alpha, gated=score is not None)
    block = blocks(net)["middle"]
    with torch.no_grad():
        block.lowrank.lora_B.normal_(std=0.3)
        if isinstance(block, DoRALinear):
            block.magnitude.mul_(torch.linspace(0.7, 1.4, 5))
        if block.gate is not None and score is not None:
            block.gate.score.fill_(score)
    return net


def middle(net: nn.Module) -> Block:
    return blocks(net)["middle"]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(11, 7, generator=torch.Generator().manual_seed(1)).to(dtype)


def formula(block: Block) -> Tensor:
    w0, a, b = block.base.weight, block.lowrank.lora_A, block.lowrank.lora_B
    v = w0 + block.lowrank.scaling * b @ a
    return block.magnitude[:, None] * v / v.norm(dim=1, keepdim=True) if isinstance(block, DoRALinear) else v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_open_block_computes_its_formula(kind: AdapterKind, bias: bool) -> None:
    net = network(kind, bias=bias).double()
    block, x = middle(net), inputs(torch.float64)[:, :6]
    assert block.lowrank.scaling == 2.0
    expected = nn.functional.linear(x, formula(block), block.bias)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.merged_weight(), formula(block), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_block_is_the_base_bit_for_bit(kind: AdapterKind) -> None:
    net = network(kind, CLOSED)
    block, x = middle(net), inputs()[:, :6]
    for mode in (True, False):
        block.train(mode)
        assert torch.equal(block(x), block.base(x))
    with torch.no_grad():
        assert torch.equal(block(x), block.base(x))
    assert block.merged_weight() is block.base.weight


@pytest.mark.parametrize("kind", KINDS)
def test_block_starts_as_the_base(kind: AdapterKind) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48))
    base, x = deepcopy(net[0]), torch.randn(9, 64)
    attach_adapter({"t": (net, "0")}, rank=8, kind=kind)
    torch.testing.assert_close(net(x), base(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", [OPEN, CLOSED])
def test_score_gradient_is_an_inner_product_with_the_delta(kind: AdapterKind, score: float) -> None:
    """dL/ds == <dL/dW, W_open - W0>, W the weight in effect; fp64, 1e-10."""
    net, x = network(kind, score).double(), inputs(torch.float64)
    block = middle(net)
    delta = (block.open_weight() - block.base.weight).detach()
    net(x).square().sum().backward()

    plain = deepcopy(net)
    merge_adapter(plain)
    merged = cast("nn.Linear", plain[2])
    merged.weight.requires_grad_()
    plain(x).square().sum().backward()
    assert block.gate is not None
    assert block.gate.score.grad is not None
    assert merged.weight.grad is not None
    assert (block.gate.score.grad - (merged.weight.grad * delta).sum()).abs().item() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_open_block_gradients_equal_those_of_the_formula(kind: AdapterKind) -> None:
    """Adapter gradients of an open block equal those of the formula."""
    net, x = network(kind).double(), inputs(torch.float64)
    block = middle(net)
    names = ["lowrank.lora_A", "lowrank.lora_B"] + (["magnitude"] if kind == "dora" else [])
    net(x).square().sum().backward()
    got = [block.get_parameter(name).grad for name in names]
    net.zero_grad()

    v = block.base.weight + block.lowrank.scaling * block.lowrank.lora_B @ block.lowrank.lora_A
    if isinstance(block, DoRALinear):
        v = block.magnitude[:, None] * v / v.norm(dim=1, keepdim=True).detach()
    hidden = nn.functional.linear(net[:2](x), v, block.bias)
    net[3:](hidden).square().sum().backward()
    for name, grad in zip(names, got, strict=True):
        assert grad is not None
        torch.testing.assert_close(grad, block.get_parameter(name).grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_block_gradients_are_zero_and_defined(kind: AdapterKind) -> None:
    """Closed block gives zero gradients to its adapter and keeps them defined."""
    net = network(kind, CLOSED)
    net(inputs()).sum().backward()
    for name, parameter in middle(net).named_parameters():
        if name.startswith("base."):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == (name == "gate.score")


@pytest.mark.parametrize("kind", KINDS)
def test_training_forward_reads_no_indicator_on_the_host(kind: AdapterKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training forward of a closed block does not read the indicator on the host."""
    net = network(kind, CLOSED)
    monkeypatch.setattr(Tensor, "__bool__", lambda _: pytest.fail("host synchronisation"))
    monkeypatch.setattr(Tensor, "item", lambda _: pytest.fail("host synchronisation"))
    net(inputs()).sum().backward()


def test_dora_norm_equals_the_norm_of_the_sum() -> None:
    """DoRA norm without the delta matrix equals the norm of the sum."""
    block = middle(network("dora").double())
    assert isinstance(block, DoRALinear)
    v = block.base.weight + block.lowrank.delta()
    torch.testing.assert_close(block.row_norm(), v.norm(dim=1), rtol=1e-12, atol=0)


def test_dora_of_a_zero_row_stays_finite() -> None:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1].zero_()
    net = nn.Sequential(linear)
    attach_adapter({"t": (net, "0")}, rank=2, kind="dora")
    out = net(torch.randn(5, 4))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_block_runs_in_bf16_with_an_fp32_score(kind: AdapterKind) -> None:
    net = network(kind).bfloat16()
    out = net(inputs(torch.bfloat16))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert [p.dtype for n, p in net.named_parameters() if n.endswith("score")] == [torch.float32]
    assert middle(net).merged_weight().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_block_runs_under_autocast(kind: AdapterKind) -> None:
    net, reference = network(kind), network(kind)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(inputs())
    out.float().sum().backward()
    reference(inputs()).sum().backward()
    torch.testing.assert_close(out.float(), reference(inputs()), rtol=0.05, atol=0.05)
    got, expected = (blocks(n)["middle"].get_parameter("gate.score").grad for n in (net, reference))
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05)
