"""A CLIP in the layout of transformers as a base, read with the name map of `selora export --to hf`.

transformers itself is not needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.model.bases.hollow import without_values
from pipeline.model.hf_layout import RESAMPLE, TRANSPOSED, hf_name
from pipeline.model.hf_tokenizer import tokenizer_files
from pipeline.model.towers import split_attention

SCHEMA = "hf:"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FILES = ["*.json", "*.txt", "model*.safetensors"]
# The defaults of transformers' own config classes.
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
# The values that are built into open_clip's CLIP.
_FIXED = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0, "num_channels": 3}


def is_transformers_clip(directory: Path) -> bool:
    """Whether the config.json of a directory is that of transformers' CLIPModel."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "clip" and "vision_config" in config


def transformers_directory(name: str) -> Path | None:
    """The directory of `hf:ORG/NAME`, downloaded if needed, or of `local-dir:PATH` in this layout; otherwise None."""
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:"))
        return directory if is_transformers_clip(directory) else None
    if not name.startswith(SCHEMA):
        return None
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(name.removeprefix(SCHEMA), allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name={name!r}: {str(error).splitlines()[0]}") from error
    if not is_transformers_clip(directory):
        raise ConfigError(
            f"model.name={name!r}: its config.json is not that of transformers' CLIPModel; a model of open_clip's "
            f"layout is hf-hub:{name.removeprefix(SCHEMA)}"
        )
    return directory


def read_transformers_clip(
    directory: Path, *, hollow: bool = False
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Read a model.

    Args:
        hollow: leave its parameters without values.

    Returns:
        open_clip's module in fp32 with its attention split, and its model_cfg and preprocess_cfg as open_clip has them.

    Raises:
        ConfigError: an option, a weight or a tokenizer that open_clip's CLIP does not have.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model_cfg = open_clip_config(_read_json(directory / "config.json"), directory)
    _check_tokenizer(directory, model_cfg["text_cfg"])
    with torch.random.fork_rng(devices=[]), without_values():
        model = CLIP(
            model_cfg["embed_dim"],
            CLIPVisionCfg(**model_cfg["vision_cfg"]),
            CLIPTextCfg(**model_cfg["text_cfg"]),
            quick_gelu=model_cfg["quick_gelu"],
            nonscalar_logit_scale=True,
        )
    split_attention(model)
    if not hollow:
        _fill(model, _weights(directory), directory)
    return model, model_cfg, open_clip_preprocessing(directory, model_cfg["vision_cfg"]["image_size"])


def open_clip_config(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """model_cfg of open_clip for a config.json of CLIPModel; ConfigError for options that open_clip does not have."""
    vision, text = _VISION | config["vision_config"], _TEXT | config["text_config"]
    activations = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
    faults = [
        f"{section}.{key}={tower[key]!r}"
        for section, tower in (("vision_config", vision), ("text_config", text))
        for key, value in _FIXED.items()
        if tower.get(key, value) != value
    ]
    if len(activations) > 1 or not activations <= {"quick_gelu", "gelu"}:
        faults.append(f"hidden_act={', '.join(sorted(activations))}")
    if faults:
        raise ConfigError(f"{directory / 'config.json'}: open_clip's CLIP has no {', '.join(faults)}")
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_sizes(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_sizes(text),
        },
    }


def _sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    ratio = inner / width
    if int(width * ratio) != inner:  # open_clip multiplies and truncates
        ratio = math.nextafter(ratio, math.inf)
    return {"width": width, "layers": tower["num_hidden_layers"], "mlp_ratio": ratio}


def open_clip_preprocessing(directory: Path, image_size: int) -> dict[str, Any]:
    """preprocess_cfg of open_clip for a preprocessor_config.json; CLIP's own without such a file."""
    from open_clip.transform import PreprocessCfg

    file = directory / "preprocessor_config.json"
    found = {"size": (image_size, image_size)}
    if file.is_file():
        found |= _preprocessing(_read_json(file), file, image_size)
    return {**asdict(PreprocessCfg()), **found}


def _preprocessing(config: Mapping[str, Any], file: Path, image_size: int) -> dict[str, Any]:
    size = config.get("size", image_size)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    interpolation = {number: name for name, number in RESAMPLE.items()}.get(config.get("resample", 3))
    squash = "shortest_edge" not in size
    sides = {size.get("height"), size.get("width")} if squash else {size["shortest_edge"]}
    if interpolation is None or sides != {image_size}:
        resize = f"size={size}, resample={config.get('resample')}"
        raise ConfigError(f"{file}: {resize} is not one of the ways in which open_clip resizes images")
    return {
        "mean": tuple(config["image_mean"]),
        "std": tuple(config["image_std"]),
        "interpolation": interpolation,
        "resize_mode": "squash" if squash else "shortest",
    }


def _check_tokenizer(directory: Path, text_cfg: Mapping[str, Any]) -> None:
    """Raise ConfigError for a vocabulary other than CLIP's, the only one that open_clip's CLIP uses."""
    if (directory / "vocab.json").is_file():
        vocabulary = _read_json(directory / "vocab.json")
    elif (directory / "tokenizer.json").is_file():
        vocabulary = _read_json(directory / "tokenizer.json").get("model", {}).get("vocab")
    else:
        return
    if vocabulary != tokenizer_files(text_cfg["context_length"])["vocab.json"]:
        raise ConfigError(f"{directory}: its vocabulary is not that of CLIP, the only one that such a base may have")


def _weights(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    single, index = (directory / name for name in WEIGHTS)
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [directory / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    else:
        raise ConfigError(
            f"{directory}: no {WEIGHTS[0]}; load it with transformers once and write it again with save_pretrained"
        )
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{directory}: its weights cannot be read: {error}") from error


@torch.no_grad()
def _fill(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    """Copy every weight by its name in CLIPModel; ConfigError for missing and unknown weights and other shapes."""
    own, faults = model.state_dict(), []
    for name, tensor in own.items():
        found = weights.pop(hf_name(name) or "", None)
        if found is None:
            faults.append(f"missing {hf_name(name) or name}")
            continue
        value = found.T if name in TRANSPOSED else found.reshape(tensor.shape) if found.ndim == 0 else found
        if value.shape != tensor.shape:
            faults.append(f"{hf_name(name)} has shape {tuple(found.shape)}")
        else:
            tensor.copy_(value)
    faults += [f"unknown {name}" for name in weights if not name.endswith("position_ids")]
    if faults:
        raise ConfigError(f"{directory}: weights do not fit its config.json: {'; '.join(faults[:6])}")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
