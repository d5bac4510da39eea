"""Several blocks that read one input, computed as one: q, k and v of a layer in a third of the kernels.

Notation as in folded.py, with an index k over the blocks: W_k = W0_k + I_k s B_k A_k, or DoRA's. The weights in effect
are stacked into one (K out, in) matrix, so that one product gives all outputs and one gives dx. Products of a block
with its own factors are batched. Each value equals that of the block computed alone, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.method.folded import compiler_loses_fold, full_precision, product_dtype, times, wide_dtype
from pipeline.method.linear import Block
from pipeline.method.route import Way, Work, cheapest

# Devices on which launching kernels costs more than stacking the weights. On a CPU a launch costs nothing, and a block
# that is known to be closed computes less alone.
DEVICES = {"cuda", "meta"}


class Stack(NamedTuple):
    """K blocks: base (K, out, in), A (K, rank, in), B (K, out, rank), DoRA's m (K, out), scores (K,)."""

    base: Tensor
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    score: Tensor | None


class StackForm(NamedTuple):
    """The constants of a stack; `dtype` is that of the products."""

    scaling: float
    threshold: float
    dtype: torch.dtype


class _Weight(NamedTuple):
    """The weights in effect (K out, in), DoRA's rho and row norms (K, out, 1), and which are closed (K, 1, 1)."""

    value: Tensor
    rho: Tensor | None
    norm: Tensor | None
    closed: Tensor | None


def project(x: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
    """(..., in) through several linears of one shape -> (..., out) each; together if all are blocks of one form."""
    blocks = [linear for linear in linears if isinstance(linear, Block)]
    way = _way(x, blocks) if len(blocks) == len(linears) else None
    if way is None:
        return [linear(x) for linear in linears]
    first = blocks[0]
    magnitudes = _present(block.scale_parameter() for block in blocks)
    scores = _present(None if block.gate is None else block.gate.score for block in blocks)
    biases = _present(block.bias for block in blocks)
    stack = Stack(
        torch.stack([block.base.weight for block in blocks]),
        torch.stack([block.lowrank.lora_A for block in blocks]),
        torch.stack([block.lowrank.lora_B for block in blocks]),
        torch.stack(magnitudes) if magnitudes else None,
        torch.cat(scores) if scores else None,
    )
    bias = torch.cat(biases) if biases else None
    threshold = 0.0 if first.gate is None else first.gate.threshold
    form = StackForm(first.lowrank.scaling, threshold, product_dtype(x))
    if way == "dense" and not compiler_loses_fold():
        out = F.linear(x, cast("Tensor", _StackedFold.apply(*stack, form)), bias)
    else:
        out = cast("Tensor", _StackedFactors.apply(x, bias, *stack, form))
    return list(out.chunk(len(blocks), dim=-1))


def _way(x: Tensor, blocks: Sequence[Block]) -> Way | None:
    """The way to compute these blocks together, if they have one form and unknown gates; None: each alone."""
    if x.device.type not in DEVICES or not torch.is_grad_enabled() or len({_form(block) for block in blocks}) > 1:
        return None
    first = blocks[0]
    if any(block.is_shut() or block.trains_base() or hasattr(block.weight, "ds_tensor") for block in blocks):
        return None
    outputs, inputs = first.weight.shape
    tokens, dora = x.numel() // inputs, first.scale_parameter() is not None
    way = cheapest(Work(tokens, inputs, outputs, first.lowrank.rank, dora, x.requires_grad, None), x.device.type)
    return None if way == "two_path" else way


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that are not None. With a walrus in a comprehension, the compiler would break the graph (Python 3.11)."""
    return [tensor for tensor in tensors if tensor is not None]


def _form(block: Block) -> tuple[object, ...]:
    """The form that blocks must share to be stacked."""
    low, gate = block.lowrank, block.gate
    threshold = None if gate is None else gate.threshold
    return type(block), block.weight.shape, block.bias is None, low.rank, low.scaling, threshold


def _weight(stack: Stack, form: StackForm) -> _Weight:
    """Folded in at least fp32 and rounded once, as `folded._weight` does for one block."""
    wide = wide_dtype(stack.base.dtype)
    base, rho, norm, closed = stack.base.to(wide), None, None, None
    folded = torch.baddbmm(base, stack.b.to(wide), stack.a.to(wide), alpha=form.scaling)
    if stack.magnitude is not None:
        # a zero row has m = 0 and must give 0, not 0 / 0
        norm = torch.linalg.vector_norm(folded, dim=2, keepdim=True).clamp_min(torch.finfo(wide).tiny ** 0.5)
        rho = stack.magnitude.to(wide)[..., None] / norm
        folded = folded.mul_(rho)
    if stack.score is not None:
        closed = (stack.score.to(wide_dtype(stack.score.dtype)) < form.threshold)[:, None, None]
        folded = torch.where(closed, base, folded)
    return _Weight(folded.to(form.dtype).flatten(0, 1), rho, norm, closed)


class _StackedFold(torch.autograd.Function):
    """The weights in effect (K out, in) as a function of the stack; its backward receives D."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, score: Tensor | None, form: StackForm
    ) -> Tensor:
        with full_precision(base.device):
            weight = _weight(Stack(base, a, b, magnitude, score), form)
        # Only DoRA's magnitude needs <D, W0>.
        ctx.save_for_backward(None if magnitude is None else base, a, b, score, weight.rho, weight.norm, weight.closed)
        ctx.form = form
        return weight.value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        base, a, b, score, rho, norm, closed = ctx.saved_tensors
        d = grad_outputs[0].view(b.shape[0], b.shape[1], -1)
        with full_precision(d.device):
            grad_b = times(ctx.form.scaling, torch.bmm(d, a.to(d.dtype).transpose(1, 2)))
            scaled_b = (b if rho is None else rho * b).to(d.dtype)
            grad_a = times(ctx.form.scaling, torch.bmm(scaled_b.transpose(1, 2), d))
            c = _products(b, grad_b, by_row=rho is not None)
            p = None if rho is None else _products(d, base, by_row=True)
            gradients = _gradients(closed, grad_a, grad_b, c, p, None if p is None else p + c, rho, norm)
        return None, *_as_stored(gradients, a, b, score), None


class _StackedFactors(torch.autograd.Function):
    """x W' + bias for all blocks at once -> (..., K out); D is not formed."""

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
        form: StackForm,
    ) -> Tensor:
        ctx.form, ctx.input_dtype = form, x.dtype
        with full_precision(x.device):
            weight = _weight(Stack(base, a, b, magnitude, score), form)
            x = x.to(form.dtype)
            out = F.linear(x, weight.value, None if bias is None else bias.to(form.dtype))
        kept = None if magnitude is None else out
        ctx.save_for_backward(x, bias, a, b, score, *weight, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, a, b, score, weight, rho, norm, closed, out = ctx.saved_tensors
        blocks, outputs, rank = b.shape
        grad = grad_outputs[0].to(weight.dtype)
        with full_precision(grad.device):
            grad_x = (grad @ weight).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
            rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            each = grad.view(-1, blocks, outputs).permute(1, 2, 0)  # (K, out, tokens)
            z = F.linear(rows, a.flatten(0, 1).to(rows.dtype)).view(-1, blocks, rank)
            grad_b = times(ctx.form.scaling, torch.bmm(each, z.transpose(0, 1)))
            scaled_b = (b if rho is None else rho * b).to(grad.dtype)
            u = torch.bmm(scaled_b.transpose(1, 2), each)  # (K, rank, tokens)
            grad_a = times(ctx.form.scaling, u.flatten(0, 1) @ rows).view_as(a)
            c = _products(b, grad_b, by_row=rho is not None)
            p, q = (None, None) if rho is None else _base_and_open(grad, out, bias, closed, rho, c)
            gradients = _gradients(closed, grad_a, grad_b, c, p, q, rho, norm)
        return grad_x, None, None, *_as_stored(gradients, a, b, score), None


def _products(first: Tensor, second: Tensor, *, by_row: bool) -> Tensor:
    """Element by element in at least fp32; by_row: their sums (K, rows, 1)."""
    wide = wide_dtype(first.dtype)
    found = first.to(wide) * second.to(wide)
    return found.sum(2, keepdim=True) if by_row else found


def _base_and_open(
    grad: Tensor, out: Tensor, bias: Tensor | None, closed: Tensor | None, rho: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """p and q (K, out, 1) without D, as `folded._base_and_folded` has them for one block."""
    wide = wide_dtype(grad.dtype)
    grad = grad.to(wide)
    h = (grad * out.reshape(grad.shape).to(wide)).sum(0)
    h = (h if bias is None else h.addcmul_(bias.to(wide), grad.sum(0), value=-1)).view_as(rho)
    open_q = torch.where(rho.abs() < torch.finfo(rho.dtype).eps ** 0.5, c, h / rho)
    if closed is None:
        return open_q - c, open_q
    return torch.where(closed, h, open_q - c), torch.where(closed, h + c, open_q)


def _gradients(
    closed: Tensor | None,
    grad_a: Tensor,
    grad_b: Tensor,
    c: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    rho: Tensor | None,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of A, B, m and the scores from those straight through the gates; names as at the top of folded.py."""
    grad_m, through = None, c
    if p is not None and q is not None and rho is not None and norm is not None:
        grad_m, grad_b, through = (q / norm).squeeze(2), rho * grad_b, rho * q - p
    if closed is not None:
        grad_a, grad_b = grad_a.masked_fill(closed, 0.0), grad_b.masked_fill(closed, 0.0)
        grad_m = None if grad_m is None else grad_m.masked_fill(closed[..., 0], 0.0)
    return grad_a, grad_b, grad_m, through.sum((1, 2))


def _as_stored(
    gradients: tuple[Tensor, Tensor, Tensor | None, Tensor], a: Tensor, b: Tensor, score: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of A, B, m and the scores, in the dtypes of these parameters."""
    grad_a, grad_b, grad_m, grad_score = gradients
    return (
        grad_a.to(a.dtype),
        grad_b.to(b.dtype),
        None if grad_m is None else grad_m.to(b.dtype),
        None if score is None else grad_score.to(score.dtype),
    )
