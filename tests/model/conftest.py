"""Tiny CLIPs on disk, written by open_clip's own classes, every weight (biases, norms) moved away from its start."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # text attributes flat on the model, nn.MultiheadAttention
    "flat": {"quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    # text tower under model.text
    "nested": {"custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT | {"proj_bias": True}},
    # a mask per sample and head: (N * heads, L, L)
    "padded": {"custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT | {"embed_cls": True, "pool_type": "last"}},
    # no mask at all
    "bidirectional": {"custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT | {"no_causal_mask": True}},
    # open_clip's own Attention module, all of its options
    "custom": {"vision_cfg": VISION | CUSTOM, "text_cfg": TEXT | CUSTOM},
    "layerscale": {"vision_cfg": VISION | {"ls_init_value": 0.5}, "text_cfg": TEXT | {"ls_init_value": 0.5}},
}


@pytest.fixture(scope="session")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(architecture, **overrides of model_cfg) -> a directory with open_clip_config.json and no weights."""

    def make(architecture: str = "flat", **overrides: Any) -> Path:
        directory = tmp_path_factory.mktemp(architecture)
        model_cfg = {"embed_dim": 16} | deepcopy(ARCHITECTURES[architecture]) | overrides
        config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}}
        (directory / "open_clip_config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture(scope="session")
def clip_dir(config_dir: Callable[..., Path]) -> Callable[..., Path]:
    """make(architecture, **overrides) -> the same with weights, as stock open_clip has them."""
    import open_clip
    from safetensors.torch import save_file

    def make(architecture: str = "flat", **overrides: Any) -> Path:
        directory = config_dir(architecture, **overrides)
        torch.manual_seed(1)
        model = open_clip.create_model(f"local-dir:{directory}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save_file(model.state_dict(), directory / "open_clip_model.safetensors")
        return directory

    return make


@pytest.fixture(scope="session")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Five images and five token rows: unequal lengths, the highest id last, zeros behind it."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(5, 3, 16, 16, generator=generator)
    texts = torch.randint(3, 58, (5, 8), generator=generator)
    for row, length in enumerate((3, 5, 8, 4, 6)):
        texts[row, length - 1] = 59
        texts[row, length:] = 0
    return images, texts
