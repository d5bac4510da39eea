"""open_clip's CLIP in the layout of transformers.CLIPModel: names, config and preprocessing, as data.

transformers itself is not needed. Options that CLIPModel does not have are refused one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.model.hf_tokenizer import END_ID, START_ID

TOWERS = {"image": "vision_model", "text": "text_model"}
PROJECTIONS = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")} | {
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
LAYER = {
    "attn": "self_attn",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies by these from the right
# Options that CLIPModel also has; all others must be at their defaults.
VISION_OPTIONS = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")
TEXT_OPTIONS = ("context_length", "layers", "width", "heads", "mlp_ratio")
IGNORED = ("patch_dropout", "output_tokens")  # they change nothing in eval mode
TOP_OPTIONS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale")
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def hf_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a merged model with split attention, under the names of CLIPModel."""
    state, strange = {}, []
    for name, tensor in model.state_dict().items():
        ours = name.removeprefix("text.")
        renamed = hf_name(ours)
        if renamed is None:
            strange.append(name)
            continue
        value = tensor.detach().reshape(()) if ours == "logit_scale" else tensor.detach()
        state[renamed] = (value.T if ours in TRANSPOSED else value).contiguous()
    if strange:
        raise ConfigError(f"transformers' CLIPModel has no place for {', '.join(strange[:6])}: export to open_clip")
    return state


def hf_name(name: str) -> str | None:
    """CLIPModel's name of a parameter, or None if it has none. Names of the text tower are given without "text."."""
    found = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        return OUTER.get(name)
    tower = TOWERS["image" if found[1] else "text"]
    module, dot, projection = found[3].rpartition(".")
    theirs = LAYER.get(found[3]) or (f"{LAYER[module]}.{projection}" if dot and module == "attn" else None)
    return None if theirs is None else f"{tower}.encoder.layers.{found[2]}.{theirs}.{found[4]}"


def hf_target(target: str) -> str:
    """ "image.3.q_proj" -> "vision_model.encoder.layers.3.self_attn.q_proj"."""
    tower, layer, projection = target.split(".")
    return f"{TOWERS[tower]}.encoder.layers.{layer}.{PROJECTIONS[projection]}"


def hf_config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the CLIPModel that computes the same as open_clip with `model_cfg`."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = _plain(CLIPVisionCfg, model_cfg["vision_cfg"], VISION_OPTIONS, "vision_cfg")
    text = _plain(CLIPTextCfg, model_cfg["text_cfg"], TEXT_OPTIONS, "text_cfg")
    if unknown := sorted(key for key in set(model_cfg) - set(TOP_OPTIONS) if model_cfg[key] not in (None, False)):
        raise ConfigError(f"transformers' CLIPModel has no {', '.join(unknown)}: export to open_clip")
    shared = {
        "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": model_cfg["embed_dim"],
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": model_cfg["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": _square(vision["image_size"], "vision_cfg.image_size"),
            "patch_size": vision["patch_size"],
            "num_channels": 3,
            "num_attention_heads": vision["width"] // vision["head_width"],
            **_sizes(vision),
            **shared,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "num_attention_heads": text["heads"],
            "bos_token_id": START_ID,
            "eos_token_id": END_ID,
            "pad_token_id": END_ID,
            **_sizes(text),
            **shared,
        },
    }


def _plain(kind: Any, given: Mapping[str, Any], options: tuple[str, ...], section: str) -> dict[str, Any]:
    """All options of a tower; ConfigError for one that CLIPModel does not have, unless it is at its default."""
    default, values = asdict(kind()), dict(given)
    strange = [
        f"{section}.{key}={value!r}"
        for key, value in values.items()
        if key not in (*options, *IGNORED) and (key not in default or value != default[key])
    ]
    if strange:
        raise ConfigError(f"transformers' CLIPModel has no {', '.join(strange)}: export to open_clip")
    return default | values


def _sizes(tower: Mapping[str, Any]) -> dict[str, int]:
    width = tower["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
    }


def _square(size: Any, option: str) -> int:
    sides = [size, size] if isinstance(size, int) else list(size)
    if sides[0] != sides[1]:
        raise ConfigError(f"transformers' CLIPModel takes square images, and {option} is {sides}: export to open_clip")
    return int(sides[0])


def hf_preprocessor(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: CLIPImageProcessor with open_clip's resize, crop, mean and std."""
    size = _square(preprocess_cfg["size"], "preprocess_cfg.size")
    mode, interpolation = preprocess_cfg.get("resize_mode", "shortest"), preprocess_cfg.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in RESAMPLE:
        raise ConfigError(f"transformers' CLIPImageProcessor cannot resize by {mode}, {interpolation}")
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if mode == "shortest" else {"height": size, "width": size},
        "resample": RESAMPLE[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg["mean"]),
        "image_std": list(preprocess_cfg["std"]),
    }
