"""The gate of a block: a learned score, a threshold and a straight-through indicator (paper eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """A block is open while `score >= threshold`.

    `score` has shape (1,), never (): DeepSpeed cannot broadcast 0-dim parameters over gloo. It stays in fp32 when the
    model is cast (`model.bfloat16()`, `model.half()`): one AdamW step of 1e-5 is below the resolution of bf16 at 0.15.
    """

    def __init__(
        self,
        init: float = 0.15,
        threshold: float = 0.1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.threshold = threshold
        # Set for all gates at once by `read_gates`, so that a step waits for the device once and not for each block.
        self.known_open: bool | None = None
        self.score = nn.Parameter(torch.full((1,), init, dtype=torch.float32, device=device))

    def is_open(self) -> Tensor:
        """Boolean tensor of shape (), on the device of the score: no host synchronisation."""
        return (self.score.detach() >= self.threshold).squeeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Follow moves between devices, refuse casts to a shorter float (`nn.Module.to` arrives here)."""
        before = self.score.detach().clone()
        super()._apply(fn, recurse)
        if torch.finfo(self.score.dtype).bits < 32:
            self.score.data = before.to(self.score.device)
        return self

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


@torch.no_grad()
def read_gates(gates: Sequence[Gate]) -> None:
    """Read on the host which gates are open, with one comparison and one transfer for all of them.

    Call it at the start of a training step on a CPU, where reading costs nothing: a block then computes only what the
    state of its gate requires. On a GPU the host would wait for the previous step, so there the gates are not read on
    the host, and every block reads its gate on the device.
    """
    if not gates:
        return
    scores = torch.cat([gate.score for gate in gates])
    thresholds = torch.tensor([gate.threshold for gate in gates], dtype=scores.dtype, device=scores.device)
    for gate, is_open in zip(gates, (scores >= thresholds).tolist(), strict=True):
        gate.known_open = is_open


class _GatedAdd(torch.autograd.Function):
    """forward: base + I(score) * delta; backward: identity through I (straight-through estimator).

    d/dbase = g; d/ddelta = I * g; d/dscore = sum(g * delta), also for a closed gate, otherwise it could never reopen.
    The sum over batch, tokens and features is accumulated in fp32 (fp64 for fp64 inputs).
    """

    @staticmethod
    def forward(ctx, base: Tensor, delta: Tensor, score: Tensor, threshold: float) -> Tensor:
        is_open = score >= threshold
        ctx.save_for_backward(delta, is_open)
        ctx.score_dtype = score.dtype
        # where, not multiplication by 0: a closed block is the base bit for bit, even with an infinite delta
        return torch.where(is_open, base + delta, base)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        delta, is_open = ctx.saved_tensors
        grad_delta = torch.where(is_open, grad, 0.0) if ctx.needs_input_grad[1] else None
        grad_score = None
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad_score = (grad.to(wide) * delta.to(wide)).sum().reshape(1).to(ctx.score_dtype)
        return grad, grad_delta, grad_score, None


def gated_add(base_out: Tensor, delta_out: Tensor, gate: Gate) -> Tensor:
    """Add `delta_out` to `base_out` (same shape) if the gate is open; see `_GatedAdd` for the gradients."""
    score = gate.score
    if torch.finfo(score.dtype).bits < 32:  # a framework has cast the parameter itself, bypassing Gate._apply
        score = score.float()
    out = _GatedAdd.apply(base_out, delta_out.to(base_out.dtype), score, gate.threshold)
    assert isinstance(out, Tensor)
    return out
