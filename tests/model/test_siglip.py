"""SigLIP: a timm image tower with attention pooling, a text tower without a causal mask, a logit bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import Config, override
from pipeline.method.adapter import attach_adapter, blocks, gate_scores, merge_adapter
from pipeline.model.clip import load_clip, save_open_clip
from pipeline.model.text import why_whole
from pipeline.model.towers import adapter_targets, apply_trainable
from pipeline.model.weights import stock_state, weights_digest
from pipeline.training.model import chosen_targets

CAPTIONS = ["a photo of a cat", "red dog", "the", "a picture of class_0 class_1 class_2 class_3 red cat"]


@pytest.fixture(scope="module")
def batch(siglip_dir: Path) -> tuple[Tensor, Tensor]:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return images, open_clip.get_tokenizer(f"local-dir:{siglip_dir}")(CAPTIONS)


@torch.no_grad()
def outputs(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return model.eval()(*batch)


def test_outputs_weights_and_digest_are_open_clips(siglip_dir: Path, batch: tuple[Tensor, Tensor]) -> None:
    clip = load_clip(str(siglip_dir))
    stock: Any = open_clip.create_model(f"local-dir:{siglip_dir}", require_pretrained=True)
    for ours, theirs in zip(outputs(clip.model, batch), outputs(stock, batch), strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-6, atol=1e-6)
    weights = load_file(siglip_dir / "open_clip_model.safetensors")
    assert clip.digest == weights_digest(weights) == weights_digest(stock_state(clip.model))
    assert torch.equal(clip.tokenizer(CAPTIONS), batch[1])
    assert batch[1].shape == (4, 8)
    assert "not causal" in (why_whole(clip.model) or "") or "moves with the length" in (why_whole(clip.model) or "")
    assert clip.preprocess_cfg["resize_mode"] == "squash"


def test_six_blocks_a_layer_and_six_of_the_pooling_by_choice(siglip_dir: Path) -> None:
    targets = list(adapter_targets(load_clip(str(siglip_dir)).model))
    six = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    layers = [f"{tower}.{layer}.{name}" for tower in ("image", "text") for layer in (0, 1) for name in six]
    assert targets == [*layers, *(f"pool.0.{name}" for name in six)]
    config = Config.model_validate({"data": {"train": "shards"}})
    assert chosen_targets(config, targets) == layers
    assert chosen_targets(override(config, {"adapter.towers": ["pool", "text"]}), targets) == targets[12:]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_blocks_merge_exactly_and_closed_ones_change_no_bit(
    kind: Any, siglip_dir: Path, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    clip = load_clip(str(siglip_dir))
    before = outputs(clip.model, batch)
    attach_adapter(adapter_targets(clip.model), rank=2, kind=kind)
    for block in blocks(clip.model).values():
        torch.nn.init.normal_(block.lowrank.lora_B)
    for score in gate_scores(clip.model):
        score.data.fill_(0.05)
    assert all(torch.equal(a, b) for a, b in zip(outputs(clip.model, batch), before, strict=True))
    for score in gate_scores(clip.model):
        score.data.fill_(0.2)
    opened = outputs(clip.model, batch)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(opened[:2], before[:2], strict=True))
    merge_adapter(clip.model)
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path, tokenizer=clip.tokenizer)
    stock: Any = open_clip.create_model(f"local-dir:{tmp_path}", require_pretrained=True)
    for ours, theirs in zip(opened, outputs(stock, batch), strict=True):
        torch.testing.assert_close(theirs.reshape(ours.shape), ours, rtol=1e-5, atol=1e-5)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS), batch[1])


def test_proj_ln_trains_projection_norms_scale_and_bias(siglip_dir: Path) -> None:
    model = load_clip(str(siglip_dir)).model
    attach_adapter(adapter_targets(model), rank=2, kind="lora")
    outside = {name for name in apply_trainable(model, "proj_ln", "lora") if ".lowrank." not in name}
    modules = ("visual.trunk.norm", "visual.trunk.attn_pool.norm", "text.ln_final", "text.text_projection")
    chosen = {f"{module}.{part}" for module in modules for part in ("weight", "bias")} | {"logit_scale", "logit_bias"}
    assert {name for name in outside if not name.endswith("score")} == chosen
    every = apply_trainable(model, "all", "lora")
    assert "visual.trunk.attn_pool.latent" in every
    assert not [name for name in every if ".base." in name]
