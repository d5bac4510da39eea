"""An exact number of active blocks, chosen by the gradient of their indicators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.budget import BlockBudget, BudgetSchedule, blocks_of_budget, most_useful


class Net(nn.Module):
    """Six linears in a row, each a target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def adapted() -> Net:
    net = Net()
    attach_adapter({f"image.{i}.fc1": (net.layers, str(i)) for i in range(6)}, rank=2)
    for i, block in enumerate(blocks(net).values()):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            block.lowrank.lora_B.copy_(0.3 * torch.randn(block.lowrank.lora_B.shape, generator=generator))
    return net


def alone(values: Tensor) -> Tensor:
    return values


def loss_of(net: Net) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator)
    return (net(x) - y).square().mean()


@pytest.mark.parametrize(
    ("blocks_", "budget", "steps"), [(144, 34, 100), (144, 1, 100), (144, 144, 100), (6, 2, 7), (6, 3, 2)]
)
def test_the_schedule_falls_from_all_to_budget(blocks_: int, budget: int, steps: int) -> None:
    schedule = BudgetSchedule(blocks_, budget, steps)
    counts = [schedule.open_after(done) for done in range(steps + 1)]
    assert counts[0] == blocks_
    assert counts[-1] == budget
    assert counts == sorted(counts, reverse=True)
    assert all(count == budget for count in counts[schedule.end :])


def test_the_mean_of_the_usefulness_covers_a_third_of_any_run() -> None:
    assert BudgetSchedule(144, 34, 3000).decay == pytest.approx(1 - 1 / 1000)
    assert BudgetSchedule(144, 34, 2).decay == 0  # so short a run takes the last step's value


def test_usefulness_is_minus_the_gradient_of_the_indicator() -> None:
    """Against autograd through an explicit factor on the block's output, in fp64."""
    net = adapted()
    budget = BlockBudget(net, 2, 100)
    loss_of(net).backward()
    budget.observe(1, alone)
    for number, found in enumerate(budget.state()["usefulness"].values()):
        reference = adapted().double()
        block = list(blocks(reference).values())[number]
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        weight, delta = block.base.weight, block.lowrank.delta()
        plain = nn.Module()
        plain.forward = lambda x, w=weight, d=delta, b=block.base.bias, f=factor: nn.functional.linear(x, w + f * d, b)
        reference.layers[number] = plain
        generator = torch.Generator().manual_seed(9)
        x, y = (torch.randn(16, 8, generator=generator).double() for _ in range(2))
        (reference(x) - y).square().mean().backward()
        assert factor.grad is not None
        assert found == pytest.approx(-factor.grad.item(), rel=1e-4, abs=1e-7)


def run(net: Net, budget: BlockBudget, first: int, last: int) -> None:
    for done in range(first, last + 1):
        net.zero_grad()
        loss_of(net).backward()
        for name, opens in budget.observe(done, alone).items():
            gate = budget.gate(name)
            gate.score.data.fill_(0.15 if opens else 0.0)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_it_ends_with_exactly_that_many_open_blocks(count: int) -> None:
    net = adapted()
    budget = BlockBudget(net, count, 20)
    run(net, budget, 1, 20)
    is_open = {name for name, block in blocks(net).items() if block.is_open()}
    assert len(is_open) == count
    assert is_open == budget.open


def test_a_restored_budget_decides_as_if_nothing_had_happened() -> None:
    straight, broken = adapted(), adapted()
    whole = BlockBudget(straight, 2, 20)
    run(straight, whole, 1, 20)
    before = BlockBudget(broken, 2, 20)
    run(broken, before, 1, 6)
    after = BlockBudget(broken, 2, 20)
    after.restore(before.state())
    run(broken, after, 7, 20)
    assert after.state() == whole.state()
    assert len(after.state()["dropped_at"]) == 4


def test_a_swap_needs_more_than_the_margin_and_ties_go_by_name() -> None:
    assert most_useful({"a": 1.0, "b": 1.01, "c": 0.0}, {"a"}, 1) == {"a"}
    assert most_useful({"a": 1.0, "b": 1.5, "c": 0.0}, {"a"}, 1) == {"b"}
    assert most_useful({"b": 1.0, "a": 1.0, "c": 1.0}, frozenset(), 2) == {"a", "b"}


def test_a_block_that_raises_the_loss_goes_first() -> None:
    assert most_useful({"harms": -5.0, "idle": 0.0, "helps": 1.0}, {"harms", "idle", "helps"}, 2) == {"idle", "helps"}


def test_a_budget_beyond_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and the 6 gated blocks"):
        BlockBudget(adapted(), 7, 10)


def test_parameters_are_spent_on_what_is_worth_most_for_each() -> None:
    """The best block is too large for what is left; the next one fits. Never more than the budget."""
    usefulness, costs = (
        {"large": 8.0, "mid": 3.0, "small": 0.9, "poor": 0.1},
        {"large": 4, "mid": 2, "small": 1, "poor": 1},
    )
    assert most_useful(usefulness, frozenset(), 5, costs) == {"large", "small"}
    assert most_useful(usefulness, frozenset(), 3, costs) == {"mid", "small"}
    assert most_useful(usefulness, frozenset(), 8, costs) == set(costs)


def test_a_budget_of_parameters_is_kept_at_every_step() -> None:
    """Of six blocks of 2 · 2 · 8 + 1 parameters, 100 pay for three; a budget that pays for none is a mistake."""
    net = adapted()
    budget = BlockBudget(net, 100, 20, parameters=True)
    for done in range(1, 21):
        loss_of(net).backward()
        for name, opens in budget.observe(done, alone).items():
            budget.gate(name).score.data.fill_(0.15 if opens else 0.0)
        assert 33 * len(budget.open) <= budget.schedule.open_after(done)
    assert len(budget.open) == 3
    with pytest.raises(ValueError, match="budget_parameters=32: must be between 33 and the 198 parameters of all"):
        BlockBudget(adapted(), 32, 10, parameters=True)


@pytest.mark.parametrize(("budget", "count"), [(12, 12), (0.25, 36), (0.001, 1), (1, 1)])
def test_a_budget_is_a_count_or_a_share(budget: float, count: int) -> None:
    assert blocks_of_budget(budget, 144) == count
