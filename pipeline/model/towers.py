"""The towers of a model: their layers, target names, and the parameters that train outside the layers.

A CLIP of open_clip has two, "image" and "text"; a classifier on a ViT of timm (vit.py) has the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from pipeline.config import ConfigError
from pipeline.method.adapter import adapter_parameters
from pipeline.method.linear import Block
from pipeline.model.attention import SplitProjections, split

TOWERS = ("image", "text")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
# Parameters of the layers, and of blocks wherever they are.
_LAYER = re.compile(r"(^|\.)((res)?blocks|layers?|block)\.\d+\.|\.(base|lowrank|gate)\.\w+$|\.magnitude$")
_HEAD = re.compile(r"^head\.")
_PROJ_LN = re.compile(
    r"^(visual\.(proj|ln_pre\..*|ln_post\..*|head\..*)|logit_scale|logit_bias|head\..*"
    r"|(text\.)?(text_projection(\..*)?|ln_final\..*)|text\.proj\..*|text\.transformer\.(layer_norm|final_layer_norm)\..*"
    r"|(visual\.)?trunk\.(norm_pre|norm|fc_norm|attn_pool\.norm|head)\..*)$"
)
Linears = Mapping[str, tuple[str, ...]]  # target -> possible paths of its linear in a layer
_ATTENTION = {name: (f"attn.{name}",) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
# A gated MLP of timm (SwiGLU) has two linears instead of fc1, unless they are packed into one.
_MLP = {
    "fc1": ("mlp.c_fc", "mlp.fc1"),
    "fc1_g": ("mlp.fc1_g",),
    "fc1_x": ("mlp.fc1_x",),
    "fc2": ("mlp.c_proj", "mlp.fc2"),
}
_OWN = _ATTENTION | _MLP
_BERT = {
    **{f"{name[0]}_proj": (f"attention.self.{name}",) for name in ("query", "key", "value")},
    "out_proj": ("attention.output.dense",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
}
_M2M = {**{name: (f"self_attn.{name}",) for name in _ATTENTION}, "fc1": ("fc1",), "fc2": ("fc2",)}
_T5 = {
    **{name: (f"layer.0.SelfAttention.{name[0]}",) for name in _ATTENTION},
    "fc1": ("layer.1.DenseReluDense.wi",),
    "fc1_g": ("layer.1.DenseReluDense.wi_0",),
    "fc1_x": ("layer.1.DenseReluDense.wi_1",),
    "fc2": ("layer.1.DenseReluDense.wo",),
}
# Paths of a tower's layers and their linears: in timm's ViT, alone or in a CLIP, in open_clip's two forms of a CLIP,
# and in the text models of Hugging Face.
_PATHS: dict[str, dict[str, Linears]] = {
    "image": {"trunk.blocks": _OWN, "visual.trunk.blocks": _OWN, "visual.transformer.resblocks": _OWN},
    "text": {
        "text.transformer.resblocks": _OWN,
        "transformer.resblocks": _OWN,
        "text.transformer.encoder.layer": _BERT,
        "text.transformer.layers": _M2M,
        "text.transformer.block": _T5,
    },
}
# The attention pooling of timm's ViT, which may carry blocks as if it were a tower of one layer.
_POOLS = ("trunk.attn_pool", "visual.trunk.attn_pool")
_POOL = {name: (name,) for name in _ATTENTION} | {"fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}


def towers_of(model: nn.Module) -> tuple[str, ...]:
    """The towers of a model: both for a CLIP, "image" for a classifier."""
    return TOWERS if hasattr(model, "encode_text") else ("image",)


def layers(model: nn.Module, tower: str) -> list[nn.Module]:
    """The residual layers of a tower ("image" or "text").

    Raises:
        ConfigError: the tower is not a plain transformer, a ResNet for example.
    """
    return _layers(model, tower)[0]


def _layers(model: nn.Module, tower: str) -> tuple[list[nn.Module], Linears]:
    for path, linears in _PATHS[tower].items():
        found = _submodule(model, path)
        if isinstance(found, nn.ModuleList | nn.Sequential):
            return list(found), linears
    raise ConfigError(
        f"model: its {tower} tower is not a plain transformer; choose a ViT CLIP such as ViT-B-16, or a ViT of timm"
    )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def split_attention(model: nn.Module) -> nn.Module:
    """Split the fused q/k/v of every layer and of an attention pooling, in place; outputs are unchanged.

    Returns:
        `model`.
    """
    for tower in towers_of(model):
        found, linears = _layers(model, tower)
        for layer in found if linears is _OWN else []:
            attention = getattr(layer, "attn", None)
            if not isinstance(attention, SplitProjections):
                layer.add_module("attn", split(attention).train(layer.training))
    for path in _POOLS:
        pool = _submodule(model, path)
        if pool is not None and not isinstance(pool, SplitProjections):
            model.set_submodule(path, split(pool).train(pool.training))
    return model


def adapter_targets(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The linears that may carry blocks.

    Returns:
        {"image.3.q_proj": (parent module, attribute of the linear)}, tower by tower and layer by layer, and
        "pool.0.q_proj" of an attention pooling last.

    Raises:
        ConfigError: a layer without one of the six projections.
    """
    targets: dict[str, tuple[nn.Module, str]] = {}
    for tower in towers_of(model):
        found, linears = _layers(model, tower)
        for index, layer in enumerate(found):
            own = _linears(layer, linears)
            if missing := [name for name in PROJECTIONS if name not in own and f"{name}_g" not in own]:
                kinds = [type(part).__name__ for part in layer.children()]
                raise ConfigError(f"model: no {missing[0]} in the layers of its {tower} tower ({', '.join(kinds)})")
            targets |= {f"{tower}.{index}.{name}": place for name, place in own.items()}
    for path in _POOLS:
        pool = _submodule(model, path)
        targets |= {f"pool.0.{name}": place for name, place in (_linears(pool, _POOL) if pool else {}).items()}
    return targets


def _linears(layer: nn.Module, linears: Linears) -> dict[str, tuple[nn.Module, str]]:
    """{projection: (parent module, attribute)} of the linears in a layer."""
    found = {}
    for name, paths in linears.items():
        for path in paths:
            parent_path, _, attribute = path.rpartition(".")
            parent = _submodule(layer, parent_path)
            if parent is not None and isinstance(getattr(parent, attribute, None), nn.Linear | Block):
                found[name] = (parent, attribute)
                break
    return found


def compile_layers(model: nn.Module, backend: str = "inductor", mode: str | None = None) -> None:
    """torch.compile the forward of every residual layer, in place: one graph serves all layers of a tower.

    Only the forward is compiled, so that hooks of the layer stay outside the graph: those of ZeRO-3 gather its
    parameters. Gates that open or close do not change the graph; blocks that settle leave it, so each pattern of
    settled blocks needs its own graph.
    """
    torch._dynamo.config.recompile_limit = 64
    for tower in towers_of(model):
        for layer in layers(model, tower):
            layer.forward = torch.compile(layer.forward, backend=backend, mode=mode, dynamic=False)


def inside_layers(name: str) -> bool:
    """Whether a parameter of this name belongs to a residual layer (adapters do)."""
    return _LAYER.search(name) is not None


def rest_parameters(model: nn.Module, train_rest: str) -> dict[str, nn.Parameter]:
    """The parameters outside the residual layers that train: "all", "proj_ln" or "none".

    proj_ln: both projections, the layer norms before and after the layers, and the logit scale. A classifier's head,
    which is new, always trains.
    """
    if train_rest not in ("all", "proj_ln", "none"):
        raise ConfigError(f"train.train_rest={train_rest!r}: expected all, proj_ln or none")
    rest = {name: parameter for name, parameter in model.named_parameters() if not inside_layers(name)}
    if train_rest == "none":
        return {name: p for name, p in rest.items() if _HEAD.match(name)}
    return rest if train_rest == "all" else {name: p for name, p in rest.items() if _PROJ_LN.match(name)}


def apply_trainable(model: nn.Module, train_rest: str, kind: str) -> list[str]:
    """Set requires_grad everywhere; call it after attaching. Returns the names of the parameters that train.

    kind "full": everything. Otherwise ("none", "lora", "dora") the adapters and the parameters of `train_rest`.
    """
    if kind == "full":
        chosen = dict(model.named_parameters())
    else:
        chosen = adapter_parameters(model) | rest_parameters(model, train_rest)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return list(chosen)
