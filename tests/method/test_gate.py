import pytest
import torch

from pipeline.method.gate import Gate, gated_add

OPEN, CLOSED = 0.15, 0.05


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


def test_score_is_one_dimensional_and_fp32() -> None:
    gate = Gate()
    assert gate.score.shape == (1,)
    assert gate.score.dtype == torch.float32


def test_gate_is_open_at_exactly_the_threshold() -> None:
    assert bool(Gate(init=0.1, threshold=0.1).is_open())
    assert not bool(Gate(init=0.0999999, threshold=0.1).is_open())
    assert Gate().is_open().shape == ()


def test_a_closed_gate_returns_the_base_bit_for_bit() -> None:
    """Closed gate returns the base bit for bit even next to an infinite delta."""
    base, delta, _ = tensors(dtype=torch.float32)
    base[0, 0] = -0.0
    delta[1, 1], delta[2, 2] = float("inf"), float("nan")
    out = gated_add(base, delta, Gate(CLOSED))
    assert torch.equal(out.view(torch.int32), base.view(torch.int32))


def test_open_gate_adds() -> None:
    base, delta, _ = tensors()
    assert torch.equal(gated_add(base, delta, Gate(OPEN)), base + delta)


@pytest.mark.parametrize("score", [OPEN, CLOSED])
def test_gradients_are_straight_through(score: float) -> None:
    base, delta, grad = (t.requires_grad_() for t in tensors())
    gate = Gate(score).double()
    gated_add(base, delta, gate).backward(grad.detach())
    assert base.grad is not None
    assert delta.grad is not None
    assert gate.score.grad is not None
    assert torch.equal(base.grad, grad)
    assert torch.equal(delta.grad, grad if score == OPEN else torch.zeros_like(grad))
    assert gate.score.grad.shape == (1,)
    torch.testing.assert_close(gate.score.grad[0], (grad * delta).sum().detach(), rtol=0, atol=1e-12)


def test_score_stays_fp32_and_exact_when_the_model_is_cast() -> None:
    gate = Gate(0.1499999)
    value = gate.score.item()
    for cast in (gate.bfloat16, gate.half, lambda: gate.to(dtype=torch.bfloat16)):
        cast()
        assert gate.score.dtype == torch.float32
        assert gate.score.item() == value
    assert gate.double().score.dtype == torch.float64


def test_score_gradient_of_bf16_activations_is_summed_in_fp32() -> None:
    # 4096 terms of 1 + 4096 of 2^-8: a bf16 sum would lose the small ones
    delta = torch.cat([torch.ones(4096), torch.full((4096,), 2.0**-8)]).bfloat16()
    gate = Gate(CLOSED).bfloat16()
    gated_add(torch.zeros_like(delta).requires_grad_(), delta, gate).backward(torch.ones_like(delta))
    assert gate.score.grad is not None
    assert gate.score.grad.dtype == torch.float32
    assert gate.score.grad.item() == 4096 + 16


def test_frozen_score_gets_no_gradient() -> None:
    base, delta, grad = tensors()
    gate = Gate(OPEN)
    gate.score.requires_grad_(False)
    gated_add(base, delta.requires_grad_(), gate).backward(grad)
    assert gate.score.grad is None
    assert delta.grad is not None
