"""Build, load and save CLIP models through open_clip."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.files import replacing
from pipeline.model.activation import lean_activations
from pipeline.model.text import accept_short_texts
from pipeline.model.towers import split_attention
from pipeline.model.weights import stock_scalars, stock_state, weights_digest

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
SCHEMAS = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class Clip:
    """A model in fp32 on the CPU, with everything needed to feed it and to save it.

    model: open_clip's module, attention split, logit_scale of shape (1,). tokenizer: list of N captions -> LongTensor
    (N, context). preprocess_cfg: size, mean, std, interpolation, resize_mode, .. as open_clip names them. model_cfg:
    open_clip's architecture, activation included. digest: sha256 of the untouched weights in open_clip's own layout.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocess_cfg: dict[str, Any]
    model_cfg: dict[str, Any]
    digest: str
    name: str
    pretrained: str | None


def load_clip(name: str, pretrained: str | None = None, *, seed: int = 0) -> Clip:
    """Load or build a CLIP.

    name: an open_clip architecture, a directory with open_clip_config.json ("local-dir:PATH" or the path alone; weights
    optional) or "hf-hub:ORG/NAME". pretrained: a tag of the architecture, a weight file or a directory that holds
    open_clip_model.safetensors; None takes the weights of the named directory or hub entry, and where an architecture
    or a directory comes without weights a random start from `seed`. Wrong names, tags, files and activations raise
    ConfigError.
    """
    import open_clip
    from safetensors import SafetensorError

    name = _full_name(name)
    model_cfg = _model_config(name)
    weight_file = _weight_file(name, pretrained)
    quick = _quick_gelu(name, pretrained, model_cfg)
    try:
        model = _create(name, pretrained, weight_file, quick, seed)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, TypeError, OSError, KeyError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(f"model.name={name!r}, model.pretrained={pretrained!r}: {error}") from error
    if quick:
        model_cfg["quick_gelu"] = True
    preprocess_cfg = deepcopy(open_clip.get_model_preprocess_cfg(model))
    digest = weights_digest(stock_scalars(model.state_dict()))
    model = lean_activations(accept_short_texts(split_attention(model)))
    return Clip(model, tokenizer, preprocess_cfg, model_cfg, digest, name, pretrained)


def model_config(name: str) -> dict[str, Any]:
    """The architecture that `load_clip` would build, as open_clip names its parts. Raises ConfigError."""
    return _model_config(_full_name(name))


def hub_entry(name: str, pretrained: str | None) -> str | None:
    """ORG/NAME at the Hugging Face hub that a model's weights come from; None where they come from elsewhere."""
    import open_clip

    plain = name.removeprefix("timm:")
    if plain.startswith("hf-hub:"):
        return plain.removeprefix("hf-hub:").partition("@")[0]
    if plain.startswith("hf:"):
        return plain.removeprefix("hf:")
    if name.startswith("timm:"):
        return f"timm/{plain}" if "." in plain and ":" not in plain and pretrained is None else None
    cfg = open_clip.get_pretrained_cfg(_full_name(name), pretrained) if pretrained and ":" not in name else {}
    entry = "/".join(str((cfg or {}).get("hf_hub") or "").split("/")[:2])
    return entry if "/" in entry else None


def _create(name: str, pretrained: str | None, weight_file: str | None, quick_gelu: bool, seed: int) -> Any:
    """open_clip's module, by open_clip's own loading code; the global random generator is left as it was."""
    import open_clip

    # with local-dir: and hf-hub: open_clip ignores `pretrained`, so a file is loaded there in a second step
    second_step = weight_file is not None and name.startswith(SCHEMAS)
    with torch.random.fork_rng(devices=[]), _open_clip_silent(second_step):
        torch.manual_seed(seed)
        model = open_clip.create_model(
            name,
            pretrained=None if second_step else weight_file or pretrained,
            load_weights=not second_step,
            force_quick_gelu=quick_gelu,
            nonscalar_logit_scale=True,
            # a hub entry whose weights do not arrive would otherwise become a random model with a warning
            require_pretrained=name.startswith("hf-hub:") and not second_step,
        )
    if second_step:
        open_clip.load_checkpoint(model, str(weight_file))  # pyright: ignore[reportArgumentType]
    return model


@contextmanager
def _open_clip_silent(silent: bool) -> Iterator[None]:
    """Hide open_clip's "initialized randomly", which is not true where the weights come right after."""
    before = logging.root.manager.disable
    if silent:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _full_name(name: str) -> str:
    """A path becomes "local-dir:PATH"; "ViT-B/16", as the papers write it, becomes "ViT-B-16"."""
    if name.startswith(SCHEMAS):
        return name
    return f"local-dir:{name}" if (Path(name) / CONFIG_FILE).is_file() else name.replace("/", "-")


def is_architecture(name: str) -> bool:
    """Whether open_clip has a model of this name; / and - are the same in a name."""
    import open_clip

    return _full_name(name) in open_clip.list_models()


def _model_config(name: str) -> dict[str, Any]:
    """The architecture as open_clip resolves it, or a ConfigError with near names."""
    from difflib import get_close_matches

    import open_clip

    if name.startswith("local-dir:") and not (Path(name.removeprefix("local-dir:")) / CONFIG_FILE).is_file():
        raise ConfigError(f"model.name={name!r}: no {CONFIG_FILE} in that directory")
    try:
        config = open_clip.get_model_config(name)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.name={name!r}: {error}") from error
    if config is None:
        near = get_close_matches(name, open_clip.list_models(), n=4) or ["ViT-B-16-quickgelu", "ViT-B-16"]
        raise ConfigError(f"model.name={name!r} is not an open_clip architecture; near: {', '.join(near)}")
    return deepcopy(config)


def _weight_file(name: str, pretrained: str | None) -> str | None:
    """The weight file that `pretrained` names, or None when it is a tag or absent."""
    if pretrained is None:
        return None
    path = Path(pretrained)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.is_file():
        return str(file)
    if path.is_dir() or name.startswith(SCHEMAS):
        raise ConfigError(f"model.pretrained={pretrained!r}: with model.name={name!r}, {file} must be a weight file")
    return None


def _quick_gelu(name: str, pretrained: str | None, model_cfg: Mapping[str, Any]) -> bool:
    """Whether QuickGELU must be forced: a tag names weights that were trained with a certain activation."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if not tag:
        return False
    wanted, present = (
        bool(tag.get("quick_gelu", False)),
        bool(model_cfg.get("quick_gelu", False)),
    )
    if present and not wanted:
        raise ConfigError(
            f"model.pretrained={pretrained!r} was trained with GELU and model.name={name!r} has QuickGELU: "
            "take the architecture without QuickGELU"
        )
    return wanted and not present


def save_open_clip(
    model: nn.Module,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    directory: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a merged model so that open_clip itself loads it by "local-dir:DIRECTORY". Returns the directory.

    tokenizer: needed (ValueError) where model_cfg names a Hugging Face tokenizer, which open_clip then reads from the
    directory. dtype: floating weights are stored in it (None: as they are); open_clip casts to fp32 when it loads.
    """
    from open_clip.tokenizer import HFTokenizer
    from safetensors.torch import save_file

    directory = Path(directory)
    if needed := model_cfg["text_cfg"].get("hf_tokenizer_name"):
        if not isinstance(tokenizer, HFTokenizer):
            raise ValueError(f"tokenizer={tokenizer!r}: the model has {needed!r}, which must be saved with it")
        tokenizer.save_pretrained(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = stock_state(model)
    if dtype is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    with replacing(directory / WEIGHTS_FILE) as partial:
        save_file({name: t.cpu().contiguous() for name, t in state.items()}, partial)
    config = {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory
