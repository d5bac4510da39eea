"""Blocks computed together equal blocks computed apart, in outputs and every gradient."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from pipeline.method import linear, stacked
from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.stacked import project

NAMES = ("q", "k", "v")
STATES = {"open": (0.2, 0.2, 0.2), "closed": (0.0, 0.0, 0.0), "mixed": (0.2, 0.05, 0.1)}


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stack on a CPU as well, whatever the sizes."""
    monkeypatch.setattr(stacked, "DEVICES", {"cpu", "meta"})
    monkeypatch.setattr(stacked, "cheapest", lambda work, device: "factors")


def layer(kind: str, scores: tuple[float, ...], *, bias: bool = True, alpha: float | None = None) -> nn.ModuleDict:
    """q, k and v (8 -> 6) in fp64 with B away from zero; without scores there are no gates."""
    torch.manual_seed(0)
    made = nn.ModuleDict({name: nn.Linear(8, 6, bias=bias) for name in NAMES})
    targets = {name: (made, name) for name in NAMES}
    attach_adapter(targets, rank=3, kind=kind, alpha=alpha, gated=bool(scores))  # pyright: ignore[reportArgumentType]
    for block, score in zip(blocks(made).values(), scores or (None,) * 3, strict=True):
        nn.init.normal_(block.lowrank.lora_B, std=0.3)
        if score is not None:
            assert block.gate is not None
            nn.init.constant_(block.gate.score, score)
        if kind == "dora":
            nn.init.uniform_(block.magnitude, 0.5, 2.0)  # pyright: ignore[reportArgumentType]
    return made.double()


def run(made: nn.ModuleDict, *, together: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of x and of all parameters."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=draw, requires_grad=True)
    linears = [made[name] for name in NAMES]
    outs = project(x, linears) if together else [each.reference(x) for each in linears]  # pyright: ignore
    weights = [torch.randn(out.shape, dtype=torch.float64, generator=draw) for out in outs]
    torch.stack([(out * weight).sum() for out, weight in zip(outs, weights, strict=True)]).sum().backward()
    assert x.grad is not None
    grads = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    return outs, grads | {"x": x.grad}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("way", ["factors", "dense"])
@pytest.mark.parametrize("state", [*STATES, "ungated"])
@pytest.mark.parametrize(("bias", "alpha"), [(True, None), (False, 6.0)])
def test_together_is_what_each_is_alone(
    kind: str, way: str, state: str, bias: bool, alpha: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "cheapest", lambda work, device: way)
    made = layer(kind, STATES.get(state, ()), bias=bias, alpha=alpha)
    outs, grads = run(deepcopy(made), together=True)
    assert outs[0].untyped_storage().data_ptr() == outs[1].untyped_storage().data_ptr(), "in one product"
    expected_outs, expected = run(made, together=False)
    for mine, theirs in zip(outs, expected_outs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_closed_block_is_its_base_beside_open_ones(kind: str) -> None:
    made = layer(kind, STATES["mixed"])
    nn.init.constant_(made["k"].lowrank.lora_B, 1e300)  # pyright: ignore
    outs, _ = run(made, together=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(outs[1], made["k"].base(x), rtol=1e-14, atol=1e-14)  # pyright: ignore


def test_only_alike_blocks_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)

    def together(made: nn.ModuleDict) -> bool:
        outs = project(x, [made[name] for name in NAMES])
        return outs[0].untyped_storage().data_ptr() == outs[1].untyped_storage().data_ptr()

    assert together(layer("lora", STATES["open"]).float())
    plain = layer("lora", STATES["open"]).float()
    plain["k"] = nn.Linear(8, 6)
    assert not together(plain)
    shut = layer("lora", STATES["closed"]).float()
    shut["v"].shut()  # pyright: ignore
    assert not together(shut)
    whole = layer("lora", STATES["open"]).float()
    whole["q"].base.requires_grad_(True)  # pyright: ignore
    assert not together(whole)
    with torch.no_grad():
        assert not together(layer("lora", STATES["open"]).float())
    monkeypatch.setattr(stacked, "cheapest", lambda work, device: "two_path")
    assert not together(layer("lora", STATES["open"]).float())
    monkeypatch.undo()
    assert not together(layer("lora", STATES["open"]).float()), "a CPU computes each by itself"


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("way", ["factors", "dense"])
def test_bf16_is_that_of_each_alone(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, against blocks alone by the same way, whose products round as theirs do."""
    monkeypatch.setattr(linear, "cheapest", lambda work, device="cpu": way)
    monkeypatch.setattr(stacked, "cheapest", lambda work, device: way)
    made = layer(kind, STATES["mixed"]).float()
    found = []
    for together in (True, False):
        own = deepcopy(made)
        x = torch.randn(7, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            outs = project(x, [own[n] for n in NAMES]) if together else [own[n](x) for n in NAMES]
        torch.cat(outs, dim=-1).float().square().sum().backward()
        grads = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        found.append((outs, grads | {"x": x.grad}))
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for name, grad in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], grad, rtol=2e-2, atol=2e-2, msg=name)
