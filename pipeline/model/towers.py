"""The towers of a CLIP: attention split into four linears, target names, and what trains outside the layers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.method.adapter import adapter_parameters

TOWERS = ("image", "text")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_LAYER = re.compile(r"(^|\.)resblocks\.\d+\.")
_PROJ_LN = re.compile(
    r"^(visual\.(proj|ln_pre\..*|ln_post\..*)|(text\.)?(text_projection(\..*)?|ln_final\..*)|logit_scale|logit_bias)$"
)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear around copies of the given tensors; draws no random numbers."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


class SplitAttention(nn.Module):
    """Self-attention with q, k, v and out as four nn.Linear, where open_clip keeps q, k and v in one parameter."""

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

    def additive_mask(self, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """(L, L) or (N * heads, L, L), boolean (True = hidden) or additive -> additive, in the dtype of q."""
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
        q, k, v = (
            self.heads(self.q_proj(query)),
            self.heads(self.k_proj(key)),
            self.heads(self.v_proj(value)),
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.additive_mask(attn_mask, q))
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
        q, k, v = (self.heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(
            self.ln_q(q),
            self.ln_k(k),
            v,
            attn_mask=self.additive_mask(attn_mask, q),
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        if self.head_scale is not None:
            out = out * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(out.transpose(1, 2).flatten(2))))


def layers(model: nn.Module, tower: str) -> nn.ModuleList:
    """The residual layers of a tower ("image" or "text"), wherever this open_clip model keeps them.

    Raises ConfigError for towers that are no open_clip transformer (ResNet, timm, Hugging Face).
    """
    paths = ("visual.transformer",) if tower == "image" else ("text.transformer", "transformer")
    for path in paths:
        try:
            found = model.get_submodule(f"{path}.resblocks")
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    raise ConfigError(f"model: its {tower} tower is no open_clip transformer; choose a ViT CLIP such as ViT-B-16")


def split_attention(model: nn.Module) -> nn.Module:
    """Split the fused q/k/v of every layer of both towers, in place; outputs are unchanged. Returns `model`."""
    from open_clip.transformer import Attention

    for tower in TOWERS:
        for layer in layers(model, tower):
            attention = layer.get_submodule("attn")
            if isinstance(attention, SplitAttention):
                continue
            if isinstance(attention, nn.MultiheadAttention):
                split: SplitAttention = SplitMultiheadAttention.of(attention)
            elif isinstance(attention, Attention):
                split = SplitCustomAttention(attention)
            else:
                raise ConfigError(f"model: cannot split attention of type {type(attention).__name__}")
            layer.add_module("attn", split.train(attention.training))
    return model


def adapter_targets(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """ "image.3.q_proj" -> (parent module, attribute of the linear), both towers, layer by layer."""
    targets: dict[str, tuple[nn.Module, str]] = {}
    for tower in TOWERS:
        for index, layer in enumerate(layers(model, tower)):
            attention, mlp = layer.get_submodule("attn"), layer.get_submodule("mlp")
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                targets[f"{tower}.{index}.{projection}"] = (attention, projection)
            targets[f"{tower}.{index}.fc1"] = (mlp, "c_fc")
            targets[f"{tower}.{index}.fc2"] = (mlp, "c_proj")
    return targets


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile the forward of every residual layer, in place: one graph serves all layers of a tower.

    The forward alone, so that hooks of the layer stay outside the graph: those of ZeRO-3 gather its parameters. Opening
    and closing gates leave the graph as it is; blocks that settle leave it, which asks for a graph per pattern of them.
    """
    torch._dynamo.config.recompile_limit = 64
    for tower in TOWERS:
        for layer in layers(model, tower):
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def inside_layers(name: str) -> bool:
    """Whether a parameter of this name belongs to a residual layer (adapters do)."""
    return _LAYER.search(name) is not None


def rest_parameters(model: nn.Module, train_rest: str) -> dict[str, nn.Parameter]:
    """Parameters outside the residual layers that train: "all", "proj_ln" or "none" of them.

    proj_ln: both projections, the layer norms before and after the layers, and the logit scale.
    """
    if train_rest not in ("all", "proj_ln", "none"):
        raise ConfigError(f"train.train_rest={train_rest!r}: expected all, proj_ln or none")
    rest = {name: parameter for name, parameter in model.named_parameters() if not inside_layers(name)}
    if train_rest == "none":
        return {}
    return rest if train_rest == "all" else {name: p for name, p in rest.items() if _PROJ_LN.match(name)}


def apply_trainable(model: nn.Module, train_rest: str, kind: str) -> list[str]:
    """Set requires_grad everywhere; call after attaching. Returns the names of what trains.

    kind "full": everything. Otherwise ("none", "lora", "dora") the adapters and what `train_rest` names.
    """
    if kind == "full":
        chosen = dict(model.named_parameters())
    else:
        chosen = adapter_parameters(model) | rest_parameters(model, train_rest)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return list(chosen)
