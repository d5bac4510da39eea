"""QuickGELU that keeps a single tensor, its input, for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SLOPE = 1.702


class _QuickGELU(torch.autograd.Function):
    """x sigmoid(c x) with c = 1.702; since it is silu(c x) / c, its derivative is that of SiLU at c x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (SLOPE * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_outputs[0], SLOPE * x)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP (GELU's sigmoid form, arXiv 1606.08415, section 2).

    With the formula written out, autograd would keep x, 1.702 x and the sigmoid; this module keeps x and recomputes the
    rest. A compiler does so by itself, and torch 2.11's loses the gradient of a Function that returns a tensor which it
    has changed in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...), in the dtype of x."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return x * torch.sigmoid(SLOPE * x)
        out = _QuickGELU.apply(x)
        assert isinstance(out, Tensor)
        return out


def lean_activations(model: nn.Module) -> nn.Module:
    """Replace every QuickGELU of open_clip and timm by the one of this file, in place. Returns `model`."""
    import open_clip.transformer
    import timm.layers

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, open_clip.transformer.QuickGELU | timm.layers.QuickGELU):
                setattr(parent, name, QuickGELU().train(child.training))
    return model
