"""The fast forms of a block: the delta folded into the weight, the gradients by the cheaper of two routes.

Notation: W the weight in effect (out, in), s the scaling, D = dL/dW. With the gate's indicator I,

    LoRA  W = W0 + I s B A
    DoRA  W = W0 + I (rho V - W0),  V = W0 + s B A,  rho = m / ||V||, the norm a constant in the backward

the gradients straight through the gate follow from D alone:

    c_j = B_j . (s D A')_j                       s <D, BA> by rows
    LoRA  dA = s B' D        dB = s D A'         dscore = sum c
    DoRA  dA = s (rho B)' D  dB = rho s D A'     dm = q / ||V||,  dscore = sum rho q - p
          p_j = <D_j, W0_j>,  q_j = <D_j, V_j> = p_j + c_j

The gradients of a closed block's pair are zero. Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

_LOSES_FOLD = TorchVersion(torch.__version__) < "2.15"


class Form(NamedTuple):
    """The constants of a block. `is_open` None: read the gate on the device; True, False: its state on the host."""

    scaling: float
    threshold: float
    is_open: bool | None


class Pair(NamedTuple):
    """The tensors of a block: base weight (out, in), A (rank, in), B (out, rank), m (out,) of DoRA, score (1,)."""

    base: Tensor
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    score: Tensor | None


class _Weight(NamedTuple):
    """The weight in effect, for DoRA also rho and the row norms (out, 1), and whether the block is closed."""

    value: Tensor
    rho: Tensor | None
    norm: Tensor | None
    closed: bool | Tensor

    def keep(self, ctx: Any, *tensors: Tensor | None) -> None:
        """Save what the backward needs: the given tensors, rho, the norms and the indicator."""
        known = not isinstance(self.closed, Tensor)
        ctx.known_closed = self.closed if known else None
        ctx.save_for_backward(*tensors, self.rho, self.norm, None if known else self.closed)


def full_precision(device: torch.device) -> nullcontext[None] | torch.autocast:
    """Disable any surrounding autocast inside the block. The meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def dense_linear(x: Tensor, bias: Tensor | None, pair: Pair, form: Form) -> Tensor:
    """(..., in) -> (..., out); D is formed in the backward. Best where the rank is high."""
    if compiler_loses_fold():
        return factor_linear(x, bias, pair, form)
    return F.linear(x, _Fold.apply(*pair, form, product_dtype(x)), bias)  # pyright: ignore[reportArgumentType]


def compiler_loses_fold() -> bool:
    """Whether the graph is traced by a torch whose compiler gives A and B of a folded weight gradients of zero.

    Torch 2.11 does so, and 2.15 does not; the versions between were not tried.
    """
    return _LOSES_FOLD and torch.compiler.is_compiling()


def factor_linear(x: Tensor, bias: Tensor | None, pair: Pair, form: Form) -> Tensor:
    """(..., in) -> (..., out); the backward goes through rank r and never forms D. Best where the rank is low."""
    return _FactorLinear.apply(x, bias, *pair, form, product_dtype(x))  # pyright: ignore[reportReturnType]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which autocast would cast the operands of a product."""
    kind = x.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def _closed(score: Tensor | None, form: Form) -> bool | Tensor:
    """Known on the host, or (1,) on the device."""
    if form.is_open is not None or score is None:
        return form.is_open is False
    score = score.detach()  # at least fp32: a framework may have cast the parameter itself, bypassing Gate._apply
    return score.to(wide_dtype(score.dtype)) < form.threshold


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least fp32; torch.promote_types would give the same by an operation of its own."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def times(scaling: float, value: Tensor) -> Tensor:
    """scaling * value, where that is not the value itself."""
    return value if scaling == 1 else scaling * value


def _unless(closed: bool | Tensor, grad: Tensor) -> Tensor:
    """The gradient of an open block's parameter; zeros for a closed block."""
    if isinstance(closed, Tensor):
        return grad.masked_fill(closed, 0.0)
    return torch.zeros_like(grad) if closed else grad


def _weight(pair: Pair, form: Form, dtype: torch.dtype) -> _Weight:
    """W, folded in at least fp32 and rounded to `dtype` once; for a closed block, the base weight itself."""
    wide = wide_dtype(pair.base.dtype)
    closed = _closed(pair.score, form)
    base, magnitude = pair.base.to(wide), pair.magnitude
    if closed is True and magnitude is None:
        return _Weight(pair.base.to(dtype), None, None, closed)
    folded = torch.addmm(base, pair.b.to(wide), pair.a.to(wide), alpha=form.scaling)
    rho = norm = None
    if magnitude is not None:
        # a zero row has m = 0 and must give 0, not 0 / 0
        norm = torch.linalg.vector_norm(folded, dim=1, keepdim=True).clamp_min(torch.finfo(wide).tiny ** 0.5)
        rho = magnitude.to(wide)[:, None] / norm
        folded = folded.mul_(rho)
    if isinstance(closed, Tensor):
        folded = torch.where(closed, base, folded)
    return _Weight((base if closed is True else folded).to(dtype), rho, norm, closed)


def _products(first: Tensor, second: Tensor, *, by_row: bool) -> Tensor:
    """Element by element in at least fp32; by_row: their sums (rows, 1)."""
    wide = wide_dtype(first.dtype)
    found = first.to(wide) * second.to(wide)
    return found.sum(1, keepdim=True) if by_row else found


class _Fold(torch.autograd.Function):
    """The weight in effect as a function of the pair, the magnitude and the score; its backward receives D."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None,
        score: Tensor | None,
        form: Form,
        dtype: torch.dtype,
    ) -> Tensor:
        pair = Pair(base, a, b, magnitude, score)
        with full_precision(base.device):
            weight = _weight(pair, form, dtype)
        weight.keep(ctx, *pair)
        ctx.form = form
        return weight.value.view_as(weight.value) if weight.value is base else weight.value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d,) = grad_outputs
        base, a, b, magnitude, score, rho, norm, indicator = ctx.saved_tensors
        closed = ctx.known_closed if indicator is None else indicator
        with full_precision(d.device):
            grad_b = times(ctx.form.scaling, d @ a.to(d.dtype).T)
            scaled_b = b if rho is None else (rho * b).to(d.dtype)
            grad_a = None if closed is True else times(ctx.form.scaling, scaled_b.to(d.dtype).T @ d)
            delta_part = _products(b, grad_b, by_row=rho is not None)
            dora = None
            if rho is not None:
                base_part = _products(d, base, by_row=True)
                dora = _DoraRows(base_part, base_part + delta_part, rho, norm)
        pair = Pair(base, a, b, magnitude, score)
        return (None, *_gradients(pair, closed, grad_a, grad_b, delta_part, dora), None, None)


class _DoraRows(NamedTuple):
    """Row values for the gradients of a DoRA block, all (out, 1).

    Attributes:
        base: p, the product of D with the base.
        folded: q, the product of D with base and delta.
        rho: magnitude / norm.
        norm: length of base and delta.
    """

    base: Tensor
    folded: Tensor
    rho: Tensor
    norm: Tensor


def _gradients(
    pair: Pair,
    closed: bool | Tensor,
    grad_a: Tensor | None,
    grad_b: Tensor,
    delta_part: Tensor,
    dora: _DoraRows | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of A, B, m and the score from those straight through the gate.

    Args:
        delta_part: c, the product of D with the delta: for each row (out, 1) with `dora`, else for each element of B.
        dora: the further products of a DoRA block.
    """
    grad_m, through = None, delta_part
    if dora is not None and pair.magnitude is not None:
        grad_m = _unless(closed, (dora.folded / dora.norm).squeeze(1).to(pair.magnitude.dtype))
        grad_b, through = dora.rho * grad_b, dora.rho * dora.folded - dora.base
    grad_a = torch.zeros_like(pair.a) if grad_a is None else _unless(closed, grad_a.to(pair.a.dtype))
    grad_score = None if pair.score is None else through.sum().reshape(1).to(pair.score.dtype)
    return grad_a, _unless(closed, grad_b.to(pair.b.dtype)), grad_m, grad_score


class _FactorLinear(torch.autograd.Function):
    """x W' + bias. z = x A' and u = dy B carry the gradients of the pair: dA = s u' x, dB = s dy' z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        base: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None,
        score: Tensor | None,
        form: Form,
        dtype: torch.dtype,
    ) -> Tensor:
        pair = Pair(base, a, b, magnitude, score)
        ctx.form, ctx.input_dtype = form, x.dtype
        with full_precision(x.device):
            weight = _weight(pair, form, dtype)
            x = x.to(dtype)
            out = F.linear(x, weight.value, None if bias is None else bias.to(dtype))
        # DoRA reads <D, W> by rows off its own output; that costs no memory where the next operation also keeps it
        weight.keep(ctx, x, bias, *pair, weight.value, out if weight.rho is not None else None)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, base, a, b, magnitude, score, weight, out, rho, norm, indicator = ctx.saved_tensors
        closed = ctx.known_closed if indicator is None else indicator
        grad = grad_outputs[0].to(weight.dtype)
        with full_precision(grad.device):
            grad_x = (grad @ weight).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
            rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            z = F.linear(rows, a.to(rows.dtype))
            grad_b = times(ctx.form.scaling, grad.T @ z)
            grad_a = None
            if closed is not True:
                scaled_b = b if rho is None else rho * b
                grad_a = times(ctx.form.scaling, (grad @ scaled_b.to(grad.dtype)).T @ rows)
            delta_part, dora = _products(b, grad_b, by_row=rho is not None), None
            if rho is not None:
                dora = _DoraRows(*_base_and_folded(grad, out, bias, closed, rho, delta_part), rho, norm)
        pair = Pair(base, a, b, magnitude, score)
        return (grad_x, None, None, *_gradients(pair, closed, grad_a, grad_b, delta_part, dora), None, None)


def _base_and_folded(
    grad: Tensor, out: Tensor, bias: Tensor | None, closed: bool | Tensor, rho: Tensor, delta_part: Tensor
) -> tuple[Tensor, Tensor]:
    """p and q without D: sum_t dy_tj (y_tj - bias_j) is <D_j, W_j>, p_j of a closed block and rho_j q_j of an open one.

    A zero row of the base has hardly any magnitude: its output is the bias and carries no information, but its p is 0.
    """
    wide = wide_dtype(grad.dtype)
    grad = grad.to(wide)
    h = (grad * out.reshape(grad.shape).to(wide)).sum(0)
    h = (h if bias is None else h.addcmul_(bias.to(wide), grad.sum(0), value=-1))[:, None]
    open_q = torch.where(rho.abs() < torch.finfo(rho.dtype).eps ** 0.5, delta_part, h / rho)
    if closed is False:
        return open_q - delta_part, open_q
    if closed is True:
        return h, h + delta_part
    return torch.where(closed, h, open_q - delta_part), torch.where(closed, h + delta_part, open_q)
