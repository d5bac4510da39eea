"""Build, load and save image models of timm: a ViT (DINO's, for example) and the classifier that is trained on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import VIT_SCHEMA as SCHEMA
from pipeline.config import ConfigError, is_vit
from pipeline.files import replacing
from pipeline.model.activation import lean_activations
from pipeline.model.towers import split_attention
from pipeline.model.weights import stock_state, weights_digest

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class VitClassifier(nn.Module):
    """timm's ViT without its head (`trunk`), and one linear over its features (`head`), None if none was trained."""

    def __init__(self, trunk: Any, classes: int | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = None if classes is None else nn.Linear(trunk.num_features, classes)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D): timm's pooled feature, for DINO the class token after the final norm."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)."""
        if self.head is None:
            raise ValueError("this model has no classifier")
        return self.head(self.encode_image(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations inside each layer in the backward."""
        self.trunk.set_grad_checkpointing(enable)


@dataclass(frozen=True)
class Vit:
    """A model in fp32 on the CPU, with everything needed to feed it; the counterpart of `Clip`.

    preprocess_cfg: as in `Clip`; the whole image is resized to the model's size, as the paper's target sets are.
    digest: sha256 of the untouched trunk. classes: class names of the classifier, in the order of its outputs; None
    without a classifier. image_size: side in pixels, if it was changed.
    """

    model: VitClassifier
    preprocess_cfg: dict[str, Any]
    digest: str
    name: str
    pretrained: str | None
    classes: tuple[str, ...] | None
    image_size: int | None = None


def untagged(name: str) -> str:
    """The name of the same model without weights, "timm:vit_small_patch16_224.dino" -> "timm:vit_small_patch16_224"."""
    return name if not is_vit(name) or ":" in name.removeprefix(SCHEMA) else name.partition(".")[0]


def load_vit(
    name: str,
    pretrained: str | None = None,
    *,
    seed: int = 0,
    classes: tuple[str, ...] | None = None,
    image_size: int | None = None,
) -> Vit:
    """Load or build a ViT through timm.

    name: "timm:" and an architecture with its tag (vit_small_patch16_224.dino: weights from the hub), an architecture
    alone (a random start from `seed`), local-dir:PATH or hf-hub:ORG/NAME. pretrained: a weight file instead, such as
    DINO's own. classes: class names of the classifier to be trained, which starts from `seed`. image_size: side in
    pixels, to which the positions are resized in fp32. Wrong names, files, sizes and models whose layers are not a
    plain transformer raise ConfigError.
    """
    import timm
    from safetensors import SafetensorError

    plain, pretrained = name.removeprefix(SCHEMA), None if pretrained is None else str(Path(pretrained).absolute())
    if plain.startswith("local-dir:"):
        plain = f"local-dir:{Path(plain.removeprefix('local-dir:')).expanduser().absolute()}"
    name = f"{SCHEMA}{plain}"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trunk: Any = timm.create_model(plain, num_classes=0, **_weights(plain, pretrained))
            model = VitClassifier(trunk, None if classes is None else len(classes))
    except (RuntimeError, ValueError, TypeError, OSError, KeyError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(f"model.name={name!r}, model.pretrained={pretrained!r}: {error}{_near(plain)}") from error
    cfg = trunk.pretrained_cfg
    split_attention(model)
    state, own = stock_state(trunk), tuple(cfg["input_size"][1:])
    if image_size is None or own == (image_size, image_size):
        image_size = None
    else:
        state["image_size"] = torch.tensor(image_size)
        _resize_images(trunk, image_size)
        cfg = trunk.pretrained_cfg
    preprocess_cfg = {
        "size": tuple(cfg["input_size"][1:]),
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "interpolation": cfg.get("interpolation", "bicubic"),
        "resize_mode": "squash",
    }
    lean_activations(model)
    return Vit(model, preprocess_cfg, weights_digest(state), name, pretrained, classes, image_size)


def _resize_images(trunk: Any, size: int) -> None:
    """Change a ViT in place to take images of size x size pixels, as if it had been built for them."""
    if not hasattr(trunk, "set_input_size"):
        raise ConfigError(f"model.image_size={size}: a {type(trunk).__name__} of timm takes one size of images")
    try:
        trunk.set_input_size(img_size=(size, size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model.image_size={size}: {error}") from error
    trunk.pretrained_cfg = {**trunk.pretrained_cfg, "input_size": (3, size, size)}


@dataclass(frozen=True)
class VitLayout:
    """The sizes of a ViT: its layers, the number of tokens that pass through them, and the number of its parameters."""

    layers: int
    width: int
    mlp: int
    heads: int
    tokens: int
    parameters: int


def vit_layout(name: str) -> VitLayout:
    """The sizes of a timm architecture, without loading weights or allocating memory.

    Raises:
        ConfigError: timm has no such architecture, or its layers are not a plain transformer.
    """
    import timm

    plain = name.removeprefix(SCHEMA)
    try:
        with torch.device("meta"):
            trunk: Any = timm.create_model(plain, pretrained=False, num_classes=0)
        layer = trunk.blocks[0]
        return VitLayout(
            layers=len(trunk.blocks),
            width=trunk.embed_dim,
            mlp=layer.mlp.fc1.out_features,
            heads=layer.attn.num_heads,
            tokens=trunk.patch_embed.num_patches + trunk.num_prefix_tokens,
            parameters=sum(parameter.numel() for parameter in trunk.parameters()),
        )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.name={name!r}: {error}{_near(plain)}") from error


def _weights(name: str, pretrained: str | None) -> dict[str, Any]:
    """The source of the weights, as arguments of timm's `create_model`."""
    if pretrained is not None:
        if not Path(pretrained).is_file():
            raise ConfigError(
                f"model.pretrained={pretrained!r}: with a timm: model it must be a weight file; "
                "model.pretrained=null takes the weights that come with the name"
            )
        return {"pretrained": True, "pretrained_cfg_overlay": {"source": "", "file": pretrained}}
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(f"model.name='{SCHEMA}{name}': no {CONFIG_FILE} in that directory")
        return {"pretrained": any((folder / file).is_file() for file in WEIGHT_FILES)}
    return {"pretrained": name.startswith("hf-hub:") or "." in name}


def _near(name: str) -> str:
    from difflib import get_close_matches

    import timm

    known = timm.list_models("vit_*", pretrained=True) + timm.list_models("vit_*")
    if name in known or ":" in name:
        return ""
    near = get_close_matches(name, known, n=4)
    return f"; near: {', '.join(near)}" if near else ""


def save_timm(vit: Vit, directory: str | Path) -> Path:
    """Write a merged model so that timm itself loads it by "local-dir:DIRECTORY". Returns the directory."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    trunk: Any = vit.model.trunk
    state = stock_state(trunk)
    if vit.model.head is not None:
        state |= {f"head.{name}": tensor.detach() for name, tensor in vit.model.head.state_dict().items()}
    with replacing(directory / WEIGHT_FILES[0]) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, partial)
    (directory / CONFIG_FILE).write_text(json.dumps(_timm_config(vit), indent=2) + "\n", encoding="utf-8")
    return directory


def _timm_config(vit: Vit) -> dict[str, Any]:
    trunk: Any = vit.model.trunk
    cfg: Mapping[str, Any] = trunk.pretrained_cfg
    classes = list(vit.classes or ())
    kept = ("input_size", "fixed_input_size", "interpolation", "mean", "std", "first_conv")
    return {
        "architecture": cfg["architecture"],
        "num_classes": len(classes),
        "num_features": trunk.num_features,
        "global_pool": trunk.global_pool,
        "model_args": {key: value for key, value in getattr(trunk, "_model_args", {}).items() if key != "num_classes"},
        "label_names": classes,
        "pretrained_cfg": {
            **{key: cfg[key] for key in kept if key in cfg},
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "num_classes": len(classes),
            "classifier": "head",
        },
    }
