"""A fine-tuned model as directories for other libraries, in safetensors; open_clip's and timm's logits of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.method.adapter import blocks
from pipeline.method.linear import Block, DoRALinear
from pipeline.model.clip import Clip, save_open_clip
from pipeline.model.hf_layout import hf_config, hf_preprocessor, hf_state, hf_target
from pipeline.model.hf_tokenizer import tokenizer_files
from pipeline.model.load import Model
from pipeline.model.onnx.write import Pixels, Precision, write_graphs
from pipeline.model.vit import Vit, save_timm

BASE = "base"  # the HF directory of the base, inside a PEFT directory
CAPTIONS = ("a photo of a cat.", "two red shoes on a wooden floor", "Zürich, at NIGHT", "an x-ray image")


def write_open_clip(clip: Clip, directory: Path) -> None:
    """open_clip_config.json and open_clip_model.safetensors of a merged model, for "local-dir:DIRECTORY"."""
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, directory, tokenizer=clip.tokenizer)
    _as_readable_as_others(directory)


def write_timm(vit: Vit, directory: Path) -> None:
    """config.json and model.safetensors of a merged ViT with its classifier, for timm's "local-dir:DIRECTORY"."""
    save_timm(vit, directory)
    _as_readable_as_others(directory)


def write_hf(clip: Clip, directory: Path) -> None:
    """Write a merged model as a directory for transformers' CLIPModel, CLIPTokenizer and CLIPImageProcessor."""
    config = hf_config(clip.model_cfg)
    files: dict[str, Any] = {
        "config.json": config,
        "preprocessor_config.json": hf_preprocessor(clip.preprocess_cfg),
        **tokenizer_files(config["text_config"]["max_position_embeddings"]),
    }
    state = hf_state(clip.model)
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(state, directory / "model.safetensors")
    _write_files(files, directory)


def write_onnx(
    model: Model,
    directory: Path,
    files: Mapping[str, Path],
    *,
    precision: Precision,
    pixels: Pixels,
    classes: Tensor | None,
) -> None:
    """Write the ONNX graphs of a merged model to `files` (see `write_graphs`), with tokenizer and preprocessing."""
    write_graphs(model, files, precision=precision, pixels=pixels, classes=classes)
    preprocessor = hf_preprocessor(model.preprocess_cfg)
    if pixels == "uint8":
        preprocessor |= {"do_rescale": False, "do_normalize": False}
    feeds: dict[str, Any] = {"preprocessor_config.json": preprocessor}
    if isinstance(model, Clip):
        if model.model_cfg["text_cfg"].get("hf_tokenizer_name"):
            tokenizer: Any = model.tokenizer
            tokenizer.save_pretrained(str(directory))
        else:
            feeds |= tokenizer_files(int(model.tokenizer(["a"]).shape[1]))
    _write_files(feeds, directory)


def _write_files(files: Mapping[str, Any], directory: Path) -> None:
    """Write texts unchanged and everything else as JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def write_peft(clip: Clip, directory: Path, base_name: str) -> None:
    """A PEFT adapter of the active blocks of an unmerged model, and BASE, the model it belongs to.

    base_name: name of the base in adapter_config.json. BASE holds everything but the blocks, including the weights that
    were trained outside them, because an adapter cannot hold those. The model is left as its base, without blocks.
    """
    hf_config(clip.model_cfg)  # refuses a model that CLIPModel cannot hold
    active = {target: block for target, block in blocks(clip.model).items() if block.is_open()}
    if not active:
        raise ConfigError("every gate is closed: no adapter is left; export the merged model (--to hf)")
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(peft_state(active), directory / "adapter_model.safetensors")
    config = json.dumps(peft_config(active, base_name), indent=1) + "\n"
    (directory / "adapter_config.json").write_text(config, encoding="utf-8")
    _strip_blocks(clip.model)
    write_hf(clip, directory / BASE)


def peft_state(active: Mapping[str, Block]) -> dict[str, Tensor]:
    """PEFT's names -> A (rank, in), B (out, rank) and, for DoRA, magnitude (out,) of each block."""
    state = {}
    for target, block in active.items():
        path = f"base_model.model.{hf_target(target)}"
        state[f"{path}.lora_A.weight"] = block.lowrank.lora_A.detach()
        state[f"{path}.lora_B.weight"] = block.lowrank.lora_B.detach()
        if isinstance(block, DoRALinear):
            state[f"{path}.lora_magnitude_vector"] = block.magnitude.detach()
    return state


def peft_config(active: Mapping[str, Block], base_name: str) -> dict[str, Any]:
    """adapter_config.json; all blocks of a run have one kind, rank and scale."""
    first = next(iter(active.values()))
    alpha = first.lowrank.scaling * first.lowrank.rank
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": "CLIPModel", "parent_library": "transformers.models.clip.modeling_clip"},
        "base_model_name_or_path": base_name,
        "r": first.lowrank.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "use_dora": isinstance(first, DoRALinear),
        "target_modules": [hf_target(target) for target in active],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _strip_blocks(model: nn.Module) -> None:
    """Replace every block by its untouched linear."""
    for parent in list(model.modules()):
        for attribute, child in list(parent.named_children()):
            if isinstance(child, Block):
                setattr(parent, attribute, child.base)


def fixed_batch(model: Model) -> tuple[Tensor, ...]:
    """Inputs to compare an export on: four seeded images (4, 3, H, W) and, for a CLIP, four captions (4, context)."""
    size = model.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (images,) if isinstance(model, Vit) else (images, model.tokenizer(list(CAPTIONS)))


@torch.no_grad()
def own_logits(model: Model, *batch: Tensor) -> Tensor:
    """(images, captions) logits of a CLIP, (images, classes) of a ViT, in fp32."""
    stock: Any = model.model.eval()
    return stock(*batch) if isinstance(model, Vit) else clip_logits(stock, *batch)


@torch.no_grad()
def clip_logits(model: Any, images: Tensor, tokens: Tensor) -> Tensor:
    """(images, captions) logits of an open_clip model: cosines times the scale plus the bias, if any; in fp32."""
    image = nn.functional.normalize(model.encode_image(images), dim=-1)
    text = nn.functional.normalize(model.encode_text(tokens), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    return logits if model.logit_bias is None else logits + model.logit_bias


def logits_by_open_clip(directory: Path, images: Tensor, tokens: Tensor) -> Tensor:
    """The same logits from stock open_clip on an exported directory."""
    import open_clip

    model: Any = open_clip.create_model(f"local-dir:{directory}", require_pretrained=True)
    return clip_logits(model.eval(), images, tokens)


@torch.no_grad()
def logits_by_timm(directory: Path, images: Tensor) -> Tensor:
    """(images, classes) logits from stock timm on an exported directory."""
    import timm

    model: Any = timm.create_model(f"local-dir:{directory}", pretrained=True)
    return model.eval()(images)


def _write_tensors(state: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})
    _as_readable_as_others(file.parent)


def _as_readable_as_others(directory: Path) -> None:
    """Apply the umask to the files: safetensors makes them readable for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)
