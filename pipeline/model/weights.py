"""A model's weights under open_clip's and timm's names, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.method.adapter import blocks
from pipeline.model.attention import SplitProjections

SCALARS = ("logit_scale", "logit_bias")


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def stock_scalars(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0-dim logit scale and bias, as in every open_clip checkpoint."""
    return {name: t.reshape(()) if name in SCALARS else t for name, t in state.items()}


def stock_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights under open_clip's or timm's own names: q, k, v in one, 0-dim logit scale. Needs a merged model."""
    if left := list(blocks(model)):
        raise ValueError(f"{len(left)} blocks are not merged ({left[0]}, ..): call merge_adapter first")
    state = stock_scalars({name: tensor.detach() for name, tensor in model.state_dict().items()})
    for path, module in model.named_modules():
        if isinstance(module, SplitProjections):
            own = {theirs: [f"{path}.{name}" for name in names] for theirs, names in module.stock.items()}
            for theirs, names in own.items():
                state[f"{path}.{theirs}"] = _joined([state.pop(name) for name in names])
    return state


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def has_bias(model: nn.Module) -> bool:
    """Whether the model adds a bias to its logits, as SigLIP does; CLIP's bound on the scale does not apply to it."""
    return getattr(model, "logit_bias", None) is not None
