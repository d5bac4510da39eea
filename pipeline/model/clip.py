"""Build, load and save CLIP models through open_clip."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.files import replacing
from pipeline.model.activation import lean_activations
from pipeline.model.bases.hollow import without_values
from pipeline.model.bases.transformers_clip import SCHEMA as TRANSFORMERS
from pipeline.model.bases.transformers_clip import (
    is_transformers_clip,
    open_clip_config,
    read_transformers_clip,
    transformers_directory,
)
from pipeline.model.bases.weight_files import advice
from pipeline.model.text import accept_short_texts
from pipeline.model.towers import split_attention
from pipeline.model.weights import stock_state, weights_digest

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
SCHEMAS = ("local-dir:", "hf-hub:", TRANSFORMERS)


@dataclass(frozen=True)
class Clip:
    """A model in fp32 on the CPU, with everything needed to feed it and to save it.

    model: open_clip's module, attention split, logit_scale of shape (1,). tokenizer: list of N captions -> LongTensor
    (N, context). preprocess_cfg: size, mean, std, interpolation, resize_mode, .. as open_clip names them. model_cfg:
    open_clip's architecture, activation included. digest: sha256 of the untouched weights in open_clip's own layout,
    with positions as they were stored, and over the image size if it was changed. name and pretrained: paths in them
    are absolute. image_size: side in pixels, if it was changed. added_bias: initial value of a logit bias that the
    base does not have.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocess_cfg: dict[str, Any]
    model_cfg: dict[str, Any]
    digest: str
    name: str
    pretrained: str | None
    image_size: int | None = None
    added_bias: float | None = None


def with_logit_bias(clip: Clip, start: float) -> Clip:
    """The same model, changed in place, with a logit bias of shape (1,) for the sigmoid loss."""
    model: Any = clip.model
    model.logit_bias = nn.Parameter(torch.full((1,), start))
    clip.model_cfg["init_logit_bias"] = start
    return replace(clip, added_bias=start)


def load_clip(
    name: str, pretrained: str | None = None, *, seed: int = 0, image_size: int | None = None, hollow: bool = False
) -> Clip:
    """Load or build a CLIP.

    name: an open_clip architecture, a directory with open_clip_config.json ("local-dir:PATH" or the path alone; weights
    optional), "hf-hub:ORG/NAME" of such an entry, or "hf:ORG/NAME" or a directory in the layout of transformers'
    CLIPModel. pretrained: a tag of the architecture, a weight file or a directory that holds
    open_clip_model.safetensors; None takes the weights of the named directory or hub entry, and for an architecture or
    a directory without weights a random start from `seed`. image_size: side in pixels, to which the positions of the
    image tower are resized in fp32. hollow: the parameters have no values and take no memory, no weights are read, and
    the digest is empty; the preprocess_cfg may lack the values of a tag. Wrong names, tags, files, sizes and
    activations raise ConfigError.
    """
    name, pretrained = _full_name(name), _full_path(pretrained)
    directory = transformers_directory(name)
    if directory is not None:
        if pretrained is not None:
            raise ConfigError(f"model.pretrained={pretrained!r}: {name} brings its own weights; leave it out")
        from open_clip.tokenizer import SimpleTokenizer

        model, model_cfg, preprocess_cfg = read_transformers_clip(directory, hollow=hollow)
        tokenizer: Any = SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])
    else:
        model, tokenizer, model_cfg, preprocess_cfg = _by_open_clip(name, pretrained, seed, hollow)
    visual = model_cfg["vision_cfg"]
    image_size = None if image_size == visual.get("image_size", 224) else image_size
    resized = {} if image_size is None else {"image_size": torch.tensor(image_size)}
    digest = "" if hollow else weights_digest(stock_state(model) | resized)
    if image_size is not None:
        preprocess_cfg["size"] = resize_images(model, image_size)
        visual["image_size"] = image_size
    model = lean_activations(accept_short_texts(split_attention(model)))
    return Clip(model, tokenizer, preprocess_cfg, model_cfg, digest, name, pretrained, image_size)


def resize_images(model: Any, size: int) -> tuple[int, int]:
    """Change a CLIP in place to take images of size x size pixels: its positions are resized in fp32, as in open_clip.

    Returns:
        The size in the form of open_clip's preprocess_cfg.

    Raises:
        ConfigError: for a timm image tower, or a size that its patches do not divide.
    """
    from open_clip.model import resize_pos_embed

    visual = model.visual
    if hasattr(visual, "trunk"):
        raise ConfigError(
            f"model.image_size={size}: open_clip builds the {type(visual.trunk).__name__} of this model at one size, "
            "so no export could be read back; choose an architecture of that size, as in ViT-B-16-SigLIP-384"
        )
    if any(size % side for side in visual.patch_size):
        raise ConfigError(f"model.image_size={size}: should be a multiple of the patch size, {visual.patch_size[0]}")
    visual.image_size = (size, size)
    visual.grid_size = tuple(size // side for side in visual.patch_size)
    state = {"visual.positional_embedding": visual.positional_embedding.detach().float()}
    resize_pos_embed(state, model)
    trains = visual.positional_embedding.requires_grad
    visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"], requires_grad=trains)
    return visual.image_size


def _by_open_clip(
    name: str, pretrained: str | None, seed: int, hollow: bool
) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """(model, tokenizer, model_cfg, preprocess_cfg)."""
    import open_clip
    from safetensors import SafetensorError

    model_cfg = _model_config(name)
    weight_file = _weight_file(name, pretrained)
    quick = _quick_gelu(name, pretrained, model_cfg)
    try:
        if hollow:
            with without_values():
                model = _create(name, None, None, quick, seed, empty=True)
        else:
            model = _create(name, pretrained, weight_file, quick, seed)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, TypeError, OSError, KeyError, SafetensorError, UnpicklingError) as error:
        why = advice(weight_file) if isinstance(error, RuntimeError | UnpicklingError) else None
        raise ConfigError(f"model.name={name!r}, model.pretrained={pretrained!r}: {why or error}") from error
    if quick:
        model_cfg["quick_gelu"] = True
    return model, tokenizer, model_cfg, deepcopy(open_clip.get_model_preprocess_cfg(model))


def model_config(name: str) -> dict[str, Any]:
    """The architecture that `load_clip` would build, in open_clip's terms. Raises ConfigError."""
    return _model_config(_full_name(name))


def hub_entry(name: str, pretrained: str | None) -> str | None:
    """ORG/NAME on the Hugging Face hub of a model's weights; None if they come from elsewhere."""
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


def _create(
    name: str, pretrained: str | None, weight_file: str | None, quick_gelu: bool, seed: int, *, empty: bool = False
) -> Any:
    """open_clip's module, loaded by open_clip itself; the state of the global random generator is preserved.

    empty: no weights are loaded, not even those that belong to the name.
    """
    import open_clip

    # with local-dir: and hf-hub: open_clip ignores `pretrained`, so a file is loaded there in a second step
    second_step = weight_file is not None and name.startswith(SCHEMAS)
    with torch.random.fork_rng(devices=[]), _open_clip_silent(second_step or empty):
        torch.manual_seed(seed)
        model = open_clip.create_model(
            name,
            pretrained=None if second_step else weight_file or pretrained,
            load_weights=not (second_step or empty),
            pretrained_text=not empty,
            force_quick_gelu=quick_gelu,
            nonscalar_logit_scale=True,
            # a hub entry whose weights do not arrive would otherwise become a random model with a warning
            require_pretrained=name.startswith("hf-hub:") and not (second_step or empty),
        )
    if second_step:
        open_clip.load_checkpoint(model, str(weight_file))  # pyright: ignore[reportArgumentType]
    return model


@contextmanager
def _open_clip_silent(silent: bool) -> Iterator[None]:
    """Hide open_clip's "initialized randomly", which is wrong when the weights are loaded right after."""
    before = logging.root.manager.disable
    if silent:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _full_name(name: str) -> str:
    """A path becomes "local-dir:PATH" with an absolute path; "ViT-B/16", as in the papers, becomes "ViT-B-16"."""
    if name.startswith("local-dir:") or is_clip_directory(Path(name)):
        return f"local-dir:{Path(name.removeprefix('local-dir:')).expanduser().absolute()}"
    return name if name.startswith(SCHEMAS) else name.replace("/", "-")


def is_clip_directory(directory: Path) -> bool:
    """Whether a directory has a CLIP in the layout of open_clip or of transformers."""
    return (directory / CONFIG_FILE).is_file() or is_transformers_clip(directory)


def _full_path(pretrained: str | None) -> str | None:
    """The absolute path of a weight file or directory; a tag unchanged."""
    if pretrained is None or not Path(pretrained).expanduser().exists():
        return pretrained
    return str(Path(pretrained).expanduser().absolute())


def is_architecture(name: str) -> bool:
    """Whether open_clip has a model of this name; / and - are the same in a name."""
    import open_clip

    return _full_name(name) in open_clip.list_models()


def _model_config(name: str) -> dict[str, Any]:
    """The architecture as open_clip resolves it, or a ConfigError with near names."""
    from difflib import get_close_matches

    import open_clip

    directory = transformers_directory(name)
    if directory is not None:
        return open_clip_config(json.loads((directory / "config.json").read_text(encoding="utf-8")), directory)
    if name.startswith("local-dir:") and not (Path(name.removeprefix("local-dir:")) / CONFIG_FILE).is_file():
        raise ConfigError(f"model.name={name!r}: no {CONFIG_FILE} in that directory, and no transformers' CLIP")
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
        raise ConfigError(
            f"model.pretrained={pretrained!r}: with model.name={name!r}, {file} must be a weight file; "
            "model.pretrained=null takes the weights that come with the name"
        )
    return None


def _quick_gelu(name: str, pretrained: str | None, model_cfg: Mapping[str, Any]) -> bool:
    """Whether QuickGELU must be forced, because the tag's weights were trained with it."""
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

    tokenizer: required (ValueError) if model_cfg names a Hugging Face tokenizer, which open_clip then reads from the
    directory. dtype: floating-point weights are stored in it (None: unchanged); open_clip casts to fp32 on loading.
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
