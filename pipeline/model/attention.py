"""Self-attention with q, k, v and out as four linears, for each of the fused forms in open_clip and timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.method.stacked import project

QKV = ("q_proj", "k_proj", "v_proj")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear around the given tensors, which may be parts of a larger one; draws no random numbers."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear


class SplitProjections(nn.Module):
    """A module with a separate linear for each projection, where open_clip and timm keep several in one parameter.

    `stock`: name of a parameter there -> names of the parameters here that form it when concatenated.
    """

    stock: dict[str, tuple[str, ...]]
    num_heads: int

    def heads(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, heads, L, C / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _name(self, **stock: tuple[str, ...]) -> None:
        """Set `stock` by modules: qkv=("q_proj", "k_proj", "v_proj") means their weights and, if present, biases."""
        own = {name for name, _ in self.named_parameters()}
        parts = [(theirs, names, part) for theirs, names in stock.items() for part in ("weight", "bias")]
        named = {f"{theirs}.{part}": tuple(f"{name}.{part}" for name in names) for theirs, names, part in parts}
        self.stock = {theirs: names for theirs, names in named.items() if own.issuperset(names)}


class SplitAttention(SplitProjections):
    """Self-attention with q, k, v and out as four nn.Linear.

    `causal`: the tower has the causal mask, which the kernel then applies itself; with a mask in memory it could not
    use its fast form.
    """

    causal = False

    def __init__(self, in_weight: Tensor, in_bias: Tensor | None, out: nn.Linear, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        weights = in_weight.chunk(3)
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(out.weight, out.bias)
        self._name(in_proj=QKV, out_proj=("out_proj",))
        # nn.MultiheadAttention and open_clip's own write in_proj_weight
        self.stock = {theirs.replace("in_proj.", "in_proj_"): own for theirs, own in self.stock.items()}

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
    """Replaces the `nn.MultiheadAttention` of open_clip's ResidualAttentionBlock."""

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
        """(N, L, C) each -> ((N, L, C), None), with the signature of nn.MultiheadAttention."""
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
    """Replaces the `Attention` of open_clip's CustomResidualAttentionBlock, with all of its options."""

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


class SplitTimmAttention(SplitProjections):
    """Replaces timm's attention modules `Attention`, `AttentionRope` and `EvaAttention`, including rotary positions.

    All of their options are supported except the sigmoid gate and fewer heads for k and v than for q.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        if getattr(attention, "gate", None) is not None:
            raise ConfigError("model: timm's gated attention is not supported")
        if getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads:
            raise ConfigError("model: attention with fewer heads for k and v than for q is not supported")
        self.num_heads = attention.num_heads
        if attention.qkv is None:
            self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        else:
            # EVA's q and v have a bias and its k has none
            biases = (getattr(attention, "q_bias", None), None, getattr(attention, "v_bias", None))
            if attention.qkv.bias is not None:
                biases = attention.qkv.bias.chunk(3)
            weights = attention.qkv.weight.chunk(3)
            self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = attention.proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norm = getattr(attention, "norm", nn.Identity())
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        self.num_prefix_tokens = getattr(attention, "num_prefix_tokens", 0)
        self.rotate_half = getattr(attention, "rotate_half", False)
        self._name(**({"qkv": QKV} if attention.qkv is not None else {}), proj=("out_proj",))
        if getattr(attention, "q_bias", None) is not None:
            self.stock |= {"q_bias": ("q_proj.bias",), "v_bias": ("v_proj.bias",)}

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(N, L, C) -> (N, L, C). rope: rotary embeddings of the patches, which follow `num_prefix_tokens` tokens."""
        q, k, v = map(self.heads, project(x, (self.q_proj, self.k_proj, self.v_proj)))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope).type_as(v), self._rotated(k, rope).type_as(v)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.proj_drop(self.out_proj(self.norm(out.transpose(1, 2).flatten(2))))

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """(N, heads, L, C / heads) with the tokens of the patches rotated by their position."""
        from timm.layers import apply_rot_embed_cat

        first = self.num_prefix_tokens
        turned = apply_rot_embed_cat(x[:, :, first:], rope, half=self.rotate_half)
        return torch.cat([x[:, :, :first], turned], dim=2)


class SplitAttentionPool(SplitProjections):
    """Replaces timm's `AttentionPoolLatent`: a learned query attends to all patches (the pooling of SigLIP)."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.num_heads, self.pool = pool.num_heads, pool.pool
        self.latent, self.pos_embed = pool.latent, pool.pos_embed
        weights = pool.kv.weight.chunk(2)
        biases = (None, None) if pool.kv.bias is None else pool.kv.bias.chunk(2)
        self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.q_proj, self.out_proj = pool.q, pool.proj
        self.q_norm, self.k_norm = pool.q_norm, pool.k_norm
        self.norm, self.mlp, self.proj_drop = pool.norm, pool.mlp, pool.proj_drop
        self._name(kv=("k_proj", "v_proj"), q=("q_proj",), proj=("out_proj",))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(N, L, C) -> (N, C)."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        latent = self.latent.expand(x.shape[0], -1, -1)  # an export would read len(x) as a constant
        q, k, v = (self.heads(proj(each)) for proj, each in ((self.q_proj, latent), (self.k_proj, x), (self.v_proj, x)))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        out = self.proj_drop(self.out_proj(out.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool == "token":
            return out[:, 0]
        return out.mean(1) if self.pool == "avg" else out


def split(attention: nn.Module | None) -> SplitProjections:
    """The same attention with q, k and v split; ConfigError for an unknown form."""
    from open_clip.transformer import Attention
    from timm.layers import AttentionPoolLatent, AttentionRope
    from timm.layers.attention import Attention as TimmAttention
    from timm.models.eva import EvaAttention

    if isinstance(attention, nn.MultiheadAttention):
        return SplitMultiheadAttention.of(attention)
    if isinstance(attention, Attention):
        return SplitCustomAttention(attention)
    if type(attention) in (TimmAttention, AttentionRope, EvaAttention):  # their subclasses compute something else
        return SplitTimmAttention(attention)
    if type(attention) is AttentionPoolLatent:
        return SplitAttentionPool(attention)
    raise ConfigError(f"model: attention of type {type(attention).__name__} has no split form here")
