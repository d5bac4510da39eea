"""The fast ways of a block against the two paths that they replace, and the choice between them."""

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.method import linear
from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.gate import read_gates
from pipeline.method.linear import Block, DoRALinear
from pipeline.method.route import Way, Work, cheapest, cost

WAYS: list[Way] = ["dense", "factors"]
KINDS = ["lora", "dora"]
OPEN, CLOSED = 0.15, 0.05


def network(
    kind: str, rank: int = 3, score: float | None = OPEN, bias: bool = True, zero_row: bool = False
) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4))
    if zero_row:
        with torch.no_grad():
            net[2].get_parameter("weight")[1].zero_()
    attach_adapter({"middle": (net, "2")}, rank=rank, kind=kind, alpha=2.0 * rank, gated=score is not None)  # pyright: ignore
    block = blocks(net)["middle"]
    with torch.no_grad():
        block.lowrank.lora_B.normal_(std=0.3)
        if isinstance(block, DoRALinear):
            block.magnitude.mul_(torch.linspace(0.7, 1.4, 5))
        if block.gate is not None and score is not None:
            block.gate.score.fill_(score)
    return net


def tell_host(net: nn.Module) -> None:
    read_gates([block.gate for block in blocks(net).values() if block.gate is not None])


def take(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "cheapest", lambda *_: way)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 11, 7, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(net: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, without those that are None."""
    net.zero_grad()
    out = net(x)
    out.float().square().sum().backward() if out.dtype == torch.bfloat16 else out.square().sum().backward()
    return {"out": out.detach()} | {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def two_path_step(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", Block.reference)
        return step(net, x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_state_has_the_gradients_of_two_paths(kind: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gate state and rank gives the gradients of two paths."""
    take(way, monkeypatch)
    for rank, score, host, bias, zero_row in itertools.product(
        (1, 3, 9), (OPEN, CLOSED, None), (False, True), (True, False), (False, True)
    ):
        net = network(kind, rank, score, bias, zero_row).double()
        if host:
            tell_host(net)
        expected, got = two_path_step(net, inputs(), monkeypatch), step(net, inputs())
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            where = f"{kind} {way} rank {rank} score {score} host {host} bias {bias} zero_row {zero_row}: {name}"
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10, msg=lambda m, w=where: f"{w}: {m}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", [False, True])
def test_a_closed_block_is_the_base_bit_for_bit(
    kind: str, way: Way, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed block is the base bit for bit even with an infinite pair."""
    take(way, monkeypatch)
    net = network(kind, score=CLOSED)
    block = blocks(net)["middle"]
    with torch.no_grad():
        block.lowrank.lora_B[0] = float("inf")
    if host:
        tell_host(net)
    x = torch.randn(4, 9, 6)
    assert torch.equal(block(x.requires_grad_()), block.base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_block_whose_score_is_frozen_leaves_the_graph(kind: str) -> None:
    net = network(kind, score=CLOSED)
    block = blocks(net)["middle"]
    assert block.gate is not None
    block.gate.score.requires_grad_(False)
    tell_host(net)
    kept: list[Tensor] = []
    x = torch.randn(9, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = block(x)
    assert all(t.data_ptr() == block.base.weight.data_ptr() for t in kept)
    out.sum().backward()
    assert block.lowrank.lora_B.grad is None
    torch.testing.assert_close(x.grad, block.base.weight.sum(0).expand(9, 6))


def test_all_gates_are_read_at_once() -> None:
    """All gates are read at once and a new reading follows the scores."""
    net = network("lora", score=CLOSED)
    gate = blocks(net)["middle"].gate
    assert gate is not None
    assert gate.known_open is None
    tell_host(net)
    assert gate.known_open is False
    with torch.no_grad():
        gate.score.fill_(OPEN)
    tell_host(net)
    assert gate.known_open is True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_folded_in_fp32_and_rounded_once(kind: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an fp64 reference, autocast to bf16 must not err more than the two paths in bf16 do."""
    take(way, monkeypatch)
    net = nn.Sequential(nn.Linear(64, 48))
    attach_adapter({"t": (net, "0")}, rank=8, kind=kind)  # pyright: ignore[reportArgumentType]
    block = blocks(net)["t"]
    nn.init.normal_(block.lowrank.lora_B, std=0.02)
    x = torch.randn(256, 64)
    exact = step(deepcopy(net).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        slow = two_path_step(net, x, monkeypatch)
        fast = step(net, x)
    assert fast["out"].dtype == torch.bfloat16
    for name, value in exact.items():
        errors = [(each[name].double() - value).norm() / value.norm() for each in (fast, slow)]
        assert errors[0] < max(1.5 * errors[1], 0.01), (name, errors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(
    kind: str, way: Way, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way, monkeypatch)
    net, x = network(kind).double(), inputs().requires_grad_()
    expected = step(net, x)
    net.zero_grad()
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()  # pyright: ignore
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "way"), [("lora", "dense"), ("dora", "factors")])
def test_a_compiled_block_is_one_graph_with_the_same_gradients(
    kind: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(way, monkeypatch)
    net = network(kind).double()
    expected = step(net, inputs())
    torch._dynamo.reset()
    got = step(torch.compile(net, backend="aot_eager", fullgraph=True), inputs())
    for name, value in expected.items():
        key = name if name == "out" else f"_orig_mod.{name}"
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("way", "is_open"),
    [
        ("two_path", True),
        *itertools.product(WAYS, (True, False)),
    ],  # the reference does the same work whatever the gate says
)
def test_the_plan_counts_the_products_that_are_made(way: Way, is_open: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    take(way, monkeypatch)
    net = nn.Sequential(nn.Linear(48, 80))
    attach_adapter({"t": (net, "0")}, rank=16, gate_init=OPEN if is_open else CLOSED)
    tell_host(net)
    x = torch.randn(96, 48, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    monkeypatch.setattr("pipeline.method.route.RIDGE", {"cpu": 0, "cuda": 0})
    assert counter.get_total_flops() == cost(way, Work(96, 48, 80, 16, is_open=is_open))


def test_the_cheapest_way_follows_tokens_and_rank() -> None:
    assert cheapest(Work(tokens=64, inputs=768, outputs=768, rank=16)) == "two_path"
    assert cheapest(Work(tokens=3152, inputs=384, outputs=1536, rank=16)) == "factors"
    assert cheapest(Work(tokens=3152, inputs=384, outputs=384, rank=256)) == "dense"
    # on a card the products of a small rank are bound by memory, and D costs no more than they do
    assert cheapest(Work(tokens=25216, inputs=768, outputs=768, rank=64), "cuda") == "dense"
