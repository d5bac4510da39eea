from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from pipeline.method.adapter import (
    GradientWatch,
    adapter_parameters,
    attach_adapter,
    blocks,
    gate_map,
    gate_scores,
    merge_adapter,
    random_targets,
    select_targets,
)

NAMES = [f"{t}.{i}.{p}" for t in ("image", "text") for i in range(3) for p in ("q_proj", "out_proj", "fc1")]


class Net(nn.Module):
    """Two parallel branches: `used` reaches the output, `idle` does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.second, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.used(x)))


def targets(net: Net) -> dict[str, tuple[nn.Module, str]]:
    return {"image.0.fc1": (net, "used"), "image.0.fc2": (net, "second"), "text.0.fc1": (net, "idle")}


def test_selection_keeps_the_order_of_the_names() -> None:
    """Select by tower and projection keeps the order of the names."""
    chosen = select_targets(NAMES, towers=["text"], projections=["fc1", "q_proj"])
    assert chosen == [n for n in NAMES if n.startswith("text.") and not n.endswith("out_proj")]


def test_select_by_globs_replaces_towers_and_projections() -> None:
    assert select_targets(NAMES, ["text"], ["fc1"], ["image.[01].q_proj", "*.2.fc1"]) == [
        "image.0.q_proj",
        "image.1.q_proj",
        "image.2.fc1",
        "text.2.fc1",
    ]


@pytest.mark.parametrize(
    ("towers", "projections", "globs", "option", "near"),
    [
        (["image"], ["qproj"], None, "projections: '*.qproj'", "q_proj"),
        (["imag"], ["fc1"], None, "towers: 'imag.*'", "image."),
        (["image"], ["fc1"], ["image.0.fc1", "image.9.q_proj"], "targets: 'image.9.q_proj'", "image.0.q_proj"),
    ],
)
def test_a_pattern_without_match_is_an_error_with_near_names(
    towers: list[str], projections: list[str], globs: list[str] | None, option: str, near: str
) -> None:
    with pytest.raises(ValueError, match="matches none") as error:
        select_targets(NAMES, towers, projections, globs)
    assert option in str(error.value)
    assert near in str(error.value)


def test_random_targets_are_a_function_of_the_seed() -> None:
    drawn = random_targets(NAMES, 5, seed=3)
    assert drawn == random_targets(NAMES, 5, seed=3)
    assert len(set(drawn)) == 5
    assert drawn == [n for n in NAMES if n in drawn]
    assert any(random_targets(NAMES, 5, seed=s) != drawn for s in range(4, 8))
    with pytest.raises(ValueError, match="random_k=19"):
        random_targets(NAMES, 19, seed=0)


def test_attach_freezes_the_base_and_names_the_state_stably() -> None:
    net = Net()
    names = attach_adapter(targets(net), rank=2, kind="dora", select=["image.0.fc2", "image.0.fc1"])
    assert names == ["image.0.fc1", "image.0.fc2"]
    assert list(blocks(net)) == names
    assert {n for n in adapter_parameters(net) if n.startswith("used.")} == {
        "used.lowrank.lora_A",
        "used.lowrank.lora_B",
        "used.magnitude",
        "used.gate.score",
    }
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {
        f"{b}.base.{p}" for b in ("used", "second") for p in ("weight", "bias")
    }
    assert isinstance(net.idle, nn.Linear)


def test_the_start_of_a_block_is_independent_of_others() -> None:
    """Start of a block does not depend on what else is attached."""
    one, all_three, other_seed = Net(), Net(), Net()
    attach_adapter(targets(one), rank=2, select=["image.0.fc2"], seed=7)
    attach_adapter(targets(all_three), rank=2, seed=7)
    attach_adapter(targets(other_seed), rank=2, seed=8)
    start = blocks(one)["image.0.fc2"].lowrank.lora_A
    assert torch.equal(start, blocks(all_three)["image.0.fc2"].lowrank.lora_A)
    assert not torch.equal(start, blocks(other_seed)["image.0.fc2"].lowrank.lora_A)
    assert not torch.equal(start, blocks(all_three)["image.0.fc1"].lowrank.lora_A)


def test_attach_names_the_fault() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"image\.0\.fc3.*image\.0\.fc"):
        attach_adapter(targets(net), rank=2, select=["image.0.fc3"])
    with pytest.raises(ValueError, match="rank=0"):
        attach_adapter(targets(net), rank=0)
    with pytest.raises(ValueError, match="kind='lara'"):
        attach_adapter(targets(net), rank=2, kind="lara")  # pyright: ignore[reportArgumentType]
    attach_adapter(targets(net), rank=2)
    with pytest.raises(ValueError, match=r"image\.0\.fc1.*already adapted"):
        attach_adapter(targets(net), rank=2)


def test_gate_map_tells_scores_and_open_blocks() -> None:
    net = Net()
    attach_adapter(targets(net), rank=2, select=["image.0.fc1", "image.0.fc2"], gate_init=0.1)
    attach_adapter(targets(net), rank=2, select=["text.0.fc1"], gated=False)
    with torch.no_grad():
        gate_scores(net)[1].fill_(0.02)
    gates = gate_map(net)
    assert gates["image.0.fc1"] == {"score": pytest.approx(0.1), "open": True}
    assert gates["image.0.fc2"] == {"score": pytest.approx(0.02), "open": False}
    assert gates["text.0.fc1"] == {"score": None, "open": True}
    assert [name for name, gate in gate_map(net).items() if gate["open"]] == ["image.0.fc1", "text.0.fc1"]
    assert len(gate_scores(net)) == 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merge_leaves_plain_linears_with_equal_outputs(kind: str) -> None:
    net, x = Net(), torch.randn(6, 4)
    untouched = deepcopy(net.second)
    attach_adapter(targets(net), rank=2, kind=kind)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for block in blocks(net).values():
            block.lowrank.lora_B.normal_()
        gate_scores(net)[1].fill_(0.0)
    before = net(x)
    assert merge_adapter(net) is net
    assert blocks(net) == {}
    assert {type(m) for m in (net.used, net.second, net.idle)} == {nn.Linear}
    assert torch.equal(net.second.weight, untouched.weight)
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_block_without_gradient_is_named(gated: bool) -> None:
    net = Net()
    attach_adapter(targets(net), rank=2, gated=gated)
    watch = GradientWatch(net)
    net(torch.randn(3, 4)).square().sum().backward()
    with pytest.raises(ValueError, match=r"1 of 3 blocks got no gradient: text\.0\.fc1$"):
        watch.check()


def test_first_step_passes_with_zero_gradients_of_a() -> None:
    """First step passes although gradients of a and score are zero."""
    net = Net()
    attach_adapter(targets(net), rank=2, select=["image.0.fc1", "image.0.fc2"])
    watch = GradientWatch(net)
    net(torch.randn(3, 4)).square().sum().backward()
    gradient = blocks(net)["image.0.fc1"].lowrank.lora_A.grad
    assert gradient is not None
    assert not gradient.any()
    for parameter in net.parameters():
        parameter.grad = None  # what DeepSpeed ZeRO does inside the backward
    watch.check()


def test_only_an_open_block_with_zero_input_is_named() -> None:
    """An open block with zero input is named a closed one is not."""
    net = Net()
    attach_adapter(targets(net), rank=2, select=["image.0.fc1"])
    watch = GradientWatch(net)
    net(torch.zeros(3, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"image\.0\.fc1"):
        watch.check()
    with torch.no_grad():
        gate_scores(net)[0].fill_(0.0)
    watch.check()
