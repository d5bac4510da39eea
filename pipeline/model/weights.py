"""A model's weights under the names that open_clip and timm give them, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.method.adapter import blocks
from pipeline.model.attention import SplitAttention

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
    """0-dim logit scale and bias, as every open_clip checkpoint has them."""
    return {name: t.reshape(()) if name in SCALARS else t for name, t in state.items()}


def stock_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights under open_clip's or timm's own names: q, k, v in one, 0-dim logit scale. Needs a merged model."""
    if left := list(blocks(model)):
        raise ValueError(f"{len(left)} blocks are not merged ({left[0]}, ..): call merge_adapter first")
    state = stock_scalars({name: tensor.detach() for name, tensor in model.state_dict().items()})
    for path, module in model.named_modules():
        if isinstance(module, SplitAttention):
            for part in ("weight", "bias"):
                names = [f"{path}.{projection}.{part}" for projection in ("q_proj", "k_proj", "v_proj")]
                if names[0] in state:
                    state[f"{path}.{module.stock_qkv}{part}"] = torch.cat([state.pop(name) for name in names])
                if f"{path}.out_proj.{part}" in state:
                    state[f"{path}.{module.stock_out}{part}"] = state.pop(f"{path}.out_proj.{part}")
    return state
