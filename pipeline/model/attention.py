"""Self-attention whose q, k, v and out are four linears, for each of the fused forms that open_clip and timm have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.method.stacked import project


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear around copies of the given tensors; draws no random numbers."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


class SplitAttention(nn.Module):
    """Self-attention with q, k, v and out as four nn.Linear, where open_clip and timm keep q, k and v in one parameter.

    `stock_qkv`, `stock_out`: how those call them. `causal`: the mask of this tower is the causal one, which the
    kernel then applies by itself; a mask in memory would keep it off its fast form.
    """

    stock_qkv, stock_out = "in_proj_", "out_proj."
    causal = False

    def __init__(self, in_weight: Tensor, in_bias: Tensor | None, out: nn.Linear, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        weights = in_weight.chunk(3)
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(out.weight, out.bias)

    def heads(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, heads, L, C / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float = 0.0) -> Tensor:
        """Softmax attention of (N, heads, L, C / heads) each -> (N, heads, L, C / heads).

        mask: (L, L) or (N * heads, L, L), boolean (True = hidden) or additive; None hides nothing.
        """
        if mask is not None and self.causal:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._additive(mask, q), dropout_p=dropout_p)

    def _additive(self, mask: Tensor | None, q: Tensor) -> Tensor | None:
        if mask is None:
            return None
        if mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
        return mask.to(q.dtype)


class SplitMultiheadAttention(SplitAttention):
    """Stands for the `nn.MultiheadAttention` of open_clip's ResidualAttentionBlock."""

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> SplitMultiheadAttention:
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ConfigError("model: this nn.MultiheadAttention has key sizes or biases that cannot be split")
        if not attention.batch_first or attention.dropout:
            raise ConfigError("model: only batch-first attention without dropout can be split")
        return cls(
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.out_proj,
            attention.num_heads,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(N, L, C) each -> ((N, L, C), None): the call and the return of nn.MultiheadAttention."""
        if need_weights:
            raise NotImplementedError("attention weights are not computed")
        linears = (self.q_proj, self.k_proj, self.v_proj)
        if query is key and key is value:
            parts = project(query, linears)
        else:
            parts = [linear(x) for linear, x in zip(linears, (query, key, value), strict=True)]
        q, k, v = map(self.heads, parts)
        out = self.attend(q, k, v, attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class SplitCustomAttention(SplitAttention):
    """Stands for open_clip's own `Attention`, of its CustomResidualAttentionBlock, with all of its options."""

    def __init__(self, attention: Any) -> None:
        super().__init__(
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.out_proj,
            num_heads=attention.num_heads,
        )
        if attention.logit_scale is not None:
            # its product is a torch.bmm over 4-dim tensors, which fails in open_clip itself
            raise ConfigError("model: scaled_cosine_attn is not supported")
        self.ln_q, self.ln_k, self.ln_inner = (
            attention.ln_q,
            attention.ln_k,
            attention.ln_inner,
        )
        self.attn_drop, self.out_drop = attention.attn_drop, attention.out_drop
        self.head_scale = attention.head_scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        q, k, v = map(self.heads, project(x, (self.q_proj, self.k_proj, self.v_proj)))
        out = self.attend(self.ln_q(q), self.ln_k(k), v, attn_mask, self.attn_drop.p if self.training else 0.0)
        if self.head_scale is not None:
            out = out * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(out.transpose(1, 2).flatten(2))))


class SplitTimmAttention(SplitAttention):
    """Stands for timm's `Attention`, of its vision transformers, with all of its options but the sigmoid gate."""

    stock_qkv, stock_out = "qkv.", "proj."

    def __init__(self, attention: Any) -> None:
        super().__init__(attention.qkv.weight, attention.qkv.bias, attention.proj, attention.num_heads)
        if getattr(attention, "gate", None) is not None:
            raise ConfigError("model: timm's gated attention is not supported")
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norm = getattr(attention, "norm", nn.Identity())
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        q, k, v = map(self.heads, project(x, (self.q_proj, self.k_proj, self.v_proj)))
        out = F.scaled_dot_product_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.proj_drop(self.out_proj(self.norm(out.transpose(1, 2).flatten(2))))


def split(attention: nn.Module | None) -> SplitAttention:
    """The same with q, k and v apart; ConfigError for a form that is not known."""
    from open_clip.transformer import Attention
    from timm.layers.attention import Attention as TimmAttention

    if isinstance(attention, nn.MultiheadAttention):
        return SplitMultiheadAttention.of(attention)
    if isinstance(attention, Attention):
        return SplitCustomAttention(attention)
    if type(attention) is TimmAttention:  # its subclasses compute something else
        return SplitTimmAttention(attention)
    raise ConfigError(f"model: cannot split attention of type {type(attention).__name__}")
