"""The fast forms of a block: the delta folded into the weight, the gradients by the cheaper of two routes.

Notation: W the weight in effect (out, in), s the scaling, D = dL/dW. With the gate's indicator I,

    LoRA  W = W0 + I s B A
    DoRA  W = W0 + I (rho V - W0),  V = W0 + s B A,  rho = m / ||V||, the norm a constant in the backward

and from D alone follow, straight through the gate,

    c_j = B_j . (s D A')_j                       s <D, BA> by rows
    LoRA  dA = s B' D        dB = s D A'         dscore = sum c
    DoRA  dA = s (rho B)' D  dB = rho s D A'     dm = q / ||V||,  dscore = sum rho q - p
          p_j = <D_j, W0_j>,  q_j = <D_j, V_j> = p_j + c_j

A closed block gives its pair the gradient zero. Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Form(NamedTuple):
    """What is constant in a block. `is_open` None: read the gate on the device; True, False: its state on the host."""

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
    """The weight in effect, and of DoRA rho and the row norms (out, 1)."""

    value: Tensor
    rho: Tensor | None
    norm: Tensor | None


def full_precision(device: torch.device) -> nullcontext[None] | torch.autocast:
    """Inside, an autocast around it has no effect. The meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def dense_linear(x: Tensor, bias: Tensor | None, pair: Pair, form: Form) -> Tensor:
    """(..., in) -> (..., out); D is formed in the backward. Best where the rank is high."""
    return F.linear(x, _Fold.apply(*pair, form, _product_dtype(x)), bias)  # pyright: ignore[reportArgumentType]


def factor_linear(x: Tensor, bias: Tensor | None, pair: Pair, form: Form) -> Tensor:
    """(..., in) -> (..., out); the backward goes through rank r and never forms D. Best where the rank is low."""
    return _FactorLinear.apply(x, bias, *pair, form, _product_dtype(x))  # pyright: ignore[reportReturnType]


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make of the operands of a product."""
    kind = x.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def _indicator(score: Tensor | None, form: Form) -> bool | Tensor:
    if form.is_open is not None or score is None:
        return form.is_open is not False
    score = score.detach()  # at least fp32: a framework may have cast the parameter itself, past Gate._apply
    return score.to(torch.promote_types(score.dtype, torch.float32)) >= form.threshold


def _keep_if(is_open: bool | Tensor, grad: Tensor) -> Tensor:
    if isinstance(is_open, Tensor):
        return torch.where(is_open, grad, 0.0)
    return grad if is_open else torch.zeros_like(grad)


def _weight(pair: Pair, form: Form, dtype: torch.dtype) -> _Weight:
    """W, folded in at least fp32 and rounded to `dtype` once; a closed block's is the base weight itself."""
    wide = torch.promote_types(pair.base.dtype, torch.float32)
    is_open = _indicator(pair.score, form)
    base, magnitude = pair.base.to(wide), pair.magnitude
    if is_open is False and magnitude is None:
        return _Weight(pair.base.to(dtype), None, None)
    folded = torch.addmm(base, pair.b.to(wide), pair.a.to(wide), alpha=form.scaling)
    rho = norm = None
    if magnitude is not None:
        # a zero row has m = 0 and must give 0, not 0 / 0
        norm = torch.linalg.vector_norm(folded, dim=1, keepdim=True).clamp_min(torch.finfo(wide).tiny ** 0.5)
        rho = magnitude.to(wide)[:, None] / norm
        folded = folded.mul_(rho)
    if isinstance(is_open, Tensor):
        folded = torch.where(is_open, folded, base)
    return _Weight((folded if is_open is not False else base).to(dtype), rho, norm)


def _row_dot(first: Tensor, second: Tensor) -> Tensor:
    """(rows, 1), summed in at least fp32."""
    wide = torch.promote_types(first.dtype, torch.float32)
    return (first.to(wide) * second.to(wide)).sum(1, keepdim=True)


class _Fold(torch.autograd.Function):
    """The weight in effect as a function of the pair, the magnitude and the score; its backward is given D."""

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
        ctx.save_for_backward(*pair, weight.rho, weight.norm)
        ctx.form = form
        return weight.value.view_as(weight.value) if weight.value is base else weight.value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d,) = grad_outputs
        base, a, b, magnitude, score, rho, norm = ctx.saved_tensors
        with full_precision(d.device):
            grad_b = ctx.form.scaling * (d @ a.to(d.dtype).T)
            scaled_b = b if rho is None else (rho * b).to(d.dtype)
            is_open = _indicator(score, ctx.form)
            grad_a = None if is_open is False else ctx.form.scaling * (scaled_b.to(d.dtype).T @ d)
            delta_part = _row_dot(b, grad_b)
            dora = None
            if rho is not None:
                base_part = _row_dot(d, base)
                dora = _DoraRows(base_part, base_part + delta_part, rho, norm)
        pair = Pair(base, a, b, magnitude, score)
        return (None, *_gradients(pair, is_open, grad_a, grad_b, delta_part, dora), None, None)


class _DoraRows(NamedTuple):
    """What the gradients of a DoRA block need for each row, all (out, 1).

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
    is_open: bool | Tensor,
    grad_a: Tensor | None,
    grad_b: Tensor,
    delta_part: Tensor,
    dora: _DoraRows | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of A, B, m and the score from those straight through the gate.

    Args:
        delta_part: c, the product of D with the delta for each row, (out, 1).
        dora: the further products of a DoRA block.
    """
    grad_m, through = None, delta_part
    if dora is not None and pair.magnitude is not None:
        grad_m = _keep_if(is_open, (dora.folded / dora.norm).squeeze(1).to(pair.magnitude.dtype))
        grad_b, through = dora.rho * grad_b, dora.rho * dora.folded - dora.base
    grad_a = torch.zeros_like(pair.a) if grad_a is None else _keep_if(is_open, grad_a.to(pair.a.dtype))
    grad_score = None if pair.score is None else through.sum().reshape(1).to(pair.score.dtype)
    return grad_a, _keep_if(is_open, grad_b.to(pair.b.dtype)), grad_m, grad_score


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
        ctx.save_for_backward(
            x, bias, *pair, weight.value, weight.rho, weight.norm, out if weight.rho is not None else None
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, base, a, b, magnitude, score, weight, rho, norm, out = ctx.saved_tensors
        grad = grad_outputs[0].to(weight.dtype)
        with full_precision(grad.device):
            grad_x = (grad @ weight).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
            rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            is_open = _indicator(score, ctx.form)
            z = F.linear(rows, a.to(rows.dtype))
            grad_b = ctx.form.scaling * (grad.T @ z)
            grad_a = None
            if is_open is not False:
                scaled_b = b if rho is None else rho * b
                grad_a = ctx.form.scaling * ((grad @ scaled_b.to(grad.dtype)).T @ rows)
            delta_part, dora = _row_dot(b, grad_b), None
            if rho is not None:
                dora = _DoraRows(*_base_and_folded(grad, out, bias, is_open, rho, delta_part), rho, norm)
        pair = Pair(base, a, b, magnitude, score)
        return (grad_x, None, None, *_gradients(pair, is_open, grad_a, grad_b, delta_part, dora), None, None)


def _base_and_folded(
    grad: Tensor, out: Tensor, bias: Tensor | None, is_open: bool | Tensor, rho: Tensor, delta_part: Tensor
) -> tuple[Tensor, Tensor]:
    """p and q without D: sum_t dy_tj (y_tj - bias_j) is <D_j, W_j>, p_j of a closed block and rho_j q_j of an open one.

    A zero row of the base has next to no magnitude: its output is the bias and says nothing, but its p is 0.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(wide)
    h = (grad * out.reshape(grad.shape).to(wide)).sum(0)
    h = (h if bias is None else h.addcmul_(bias.to(wide), grad.sum(0), value=-1))[:, None]
    open_q = torch.where(rho.abs() < torch.finfo(rho.dtype).eps ** 0.5, delta_part, h / rho)
    if is_open is True:
        return open_q - delta_part, open_q
    if is_open is False:
        return h, h + delta_part
    return torch.where(is_open, open_q - delta_part, h), torch.where(is_open, open_q, h + delta_part)
