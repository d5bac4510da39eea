"""The towers of a model: their layers, target names, and what trains outside the layers.

A CLIP of open_clip has two, "image" and "text"; a classifier on a ViT of timm (vit.py) has the first.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from pipeline.config import ConfigError
from pipeline.method.adapter import adapter_parameters
from pipeline.model.attention import SplitAttention, split

TOWERS = ("image", "text")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_LAYER = re.compile(r"(^|\.)(res)?blocks\.\d+\.")
_HEAD = re.compile(r"^head\.")
_PROJ_LN = re.compile(
    r"^(visual\.(proj|ln_pre\..*|ln_post\..*)|(text\.)?(text_projection(\..*)?|ln_final\..*)|logit_scale|logit_bias"
    r"|trunk\.(norm_pre|norm|fc_norm)\..*|head\..*)$"
)
# Where the layers of a tower are: in timm's ViT, or in the two forms of open_clip's CLIP.
_PATHS = {
    "image": ("trunk.blocks", "visual.transformer.resblocks"),
    "text": ("text.transformer.resblocks", "transformer.resblocks"),
}
# The linears of a layer: projection -> its module and the names it may have there.
_LINEARS = {
    **{name: ("attn", (name,)) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "fc1": ("mlp", ("c_fc", "fc1")),
    "fc2": ("mlp", ("c_proj", "fc2")),
}


def towers_of(model: nn.Module) -> tuple[str, ...]:
    """The towers that a model has: both of a CLIP, "image" of a classifier."""
    return TOWERS if hasattr(model, "encode_text") else ("image",)


def layers(model: nn.Module, tower: str) -> list[nn.Module]:
    """The residual layers of a tower ("image" or "text"), wherever this model keeps them.

    Raises ConfigError for towers that are no transformer of open_clip's or timm's own (ResNet, Hugging Face).
    """
    for path in _PATHS[tower]:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList | nn.Sequential):
            return list(found)
    raise ConfigError(
        f"model: its {tower} tower is not a plain transformer; choose a ViT CLIP such as ViT-B-16, or a ViT of timm"
    )


def split_attention(model: nn.Module) -> nn.Module:
    """Split the fused q/k/v of every layer of its towers, in place; outputs are unchanged. Returns `model`."""
    for tower in towers_of(model):
        for layer in layers(model, tower):
            attention = getattr(layer, "attn", None)
            if not isinstance(attention, SplitAttention):
                layer.add_module("attn", split(attention).train(layer.training))
    return model


def adapter_targets(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """ "image.3.q_proj" -> (parent module, attribute of the linear), all towers, layer by layer."""
    targets: dict[str, tuple[nn.Module, str]] = {}
    for tower in towers_of(model):
        for index, layer in enumerate(layers(model, tower)):
            for projection, (parent, names) in _LINEARS.items():
                module = layer.get_submodule(parent)
                found = next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)
                if found is None:
                    raise ConfigError(f"model: no {projection} in the {parent} of its layers ({type(module).__name__})")
                targets[f"{tower}.{index}.{projection}"] = (module, found)
    return targets


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile the forward of every residual layer, in place: one graph serves all layers of a tower.

    The forward alone, so that hooks of the layer stay outside the graph: those of ZeRO-3 gather its parameters. Opening
    and closing gates leave the graph as it is; blocks that settle leave it, which asks for a graph per pattern of them.
    """
    torch._dynamo.config.recompile_limit = 64
    for tower in towers_of(model):
        for layer in layers(model, tower):
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)


def inside_layers(name: str) -> bool:
    """Whether a parameter of this name belongs to a residual layer (adapters do)."""
    return _LAYER.search(name) is not None


def rest_parameters(model: nn.Module, train_rest: str) -> dict[str, nn.Parameter]:
    """Parameters outside the residual layers that train: "all", "proj_ln" or "none" of them.

    proj_ln: both projections, the layer norms before and after the layers, and the logit scale. A classifier's head,
    which starts from nothing, always trains.
    """
    if train_rest not in ("all", "proj_ln", "none"):
        raise ConfigError(f"train.train_rest={train_rest!r}: expected all, proj_ln or none")
    rest = {name: parameter for name, parameter in model.named_parameters() if not inside_layers(name)}
    if train_rest == "none":
        return {name: p for name, p in rest.items() if _HEAD.match(name)}
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
