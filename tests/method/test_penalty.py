import pytest
import torch

from pipeline.method.penalty import gate_penalty

VALUES = [0.15, 0.1, -0.05, 0.3]
EXPECTED = {"l1": 0.15 + 0.1 + 0.05 + 0.3, "l2": 0.0225 + 0.01 + 0.0025 + 0.09, "hinge": 0.05 + 0.2}
SLOPES = {"l1": [1, 1, -1, 1], "l2": [0.3, 0.2, -0.1, 0.6], "hinge": [1, 0, 0, 1]}


def scores() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in VALUES]


@pytest.mark.parametrize("kind", ["l1", "l2", "hinge"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_slope_follow_the_formula(kind, reduction) -> None:
    params = scores()
    value = gate_penalty(params, kind, 0.5, reduction, 0.1)
    factor = 0.5 / (len(VALUES) if reduction == "mean" else 1)
    assert value.shape == ()
    assert value.item() == pytest.approx(EXPECTED[kind] * factor, abs=1e-12)
    value.backward()
    assert [p.grad.item() for p in params if p.grad is not None] == pytest.approx([s * factor for s in SLOPES[kind]])


def test_default_is_the_mean_of_the_absolute_scores() -> None:
    assert gate_penalty(scores()).item() == pytest.approx(0.15)


def test_without_gates_it_is_zero() -> None:
    assert gate_penalty([]).item() == 0


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match="penalty='l3'"):
        gate_penalty(scores(), "l3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="reduction='max'"):
        gate_penalty(scores(), "l1", 1.0, "max")  # pyright: ignore[reportArgumentType]
