from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.method.adapter import attach_adapter, blocks
from pipeline.model.clip import load_clip
from pipeline.model.towers import (
    PROJECTIONS,
    adapter_targets,
    apply_trainable,
    inside_layers,
    rest_parameters,
    split_attention,
)

MakeDir = Callable[..., Path]
Batch = tuple[Tensor, Tensor]
ARCHITECTURES = ["flat", "nested", "padded", "bidirectional", "custom", "layerscale"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_split_model_equals_the_untouched_one(
    architecture: str, training: bool, clip_dir: MakeDir, batch: Batch
) -> None:
    directory = clip_dir(architecture)
    stock = open_clip.create_model(f"local-dir:{directory}").train(training)
    ours = load_clip(f"local-dir:{directory}").model.train(training)
    for ours_out, stock_out in zip(ours(*batch), stock(*batch), strict=True):
        torch.testing.assert_close(ours_out.reshape(stock_out.shape), stock_out, rtol=0, atol=1e-6)
    with torch.no_grad():  # here nn.MultiheadAttention takes its fused inference path
        both: list[Any] = [ours, stock]
        ours_text, stock_text = (model.encode_text(batch[1], normalize=True) for model in both)
        torch.testing.assert_close(ours_text, stock_text, rtol=0, atol=1e-6)


def gradient(module: nn.Module, name: str) -> Tensor:
    found = module.get_parameter(name).grad
    assert found is not None, name
    return found


@pytest.mark.parametrize("architecture", ["flat", "padded", "custom"])
def test_gradients_of_the_split_model_are_those_of_the_fused_one(
    architecture: str, clip_dir: MakeDir, batch: Batch
) -> None:
    directory = clip_dir(architecture)
    stock = open_clip.create_model(f"local-dir:{directory}")
    ours = load_clip(f"local-dir:{directory}").model
    for model in (stock, ours):
        image, text, scale = model(*batch)
        (scale * image @ text.T).diagonal().sum().backward()
    for tower in ("visual.transformer", "transformer"):
        prefix = f"text.{tower}" if tower == "transformer" and architecture == "padded" else tower
        fused = stock.get_submodule(f"{prefix}.resblocks.1.attn")
        split = ours.get_submodule(f"{prefix}.resblocks.1.attn")
        for part in ("weight", "bias"):
            grads = [gradient(split, f"{p}_proj.{part}") for p in "qkv"]
            expected = gradient(fused, f"in_proj_{part}")
            torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-4, atol=1e-5)


def test_boolean_mask_hides_like_the_additive_one(clip_dir: MakeDir) -> None:
    model = load_clip(f"local-dir:{clip_dir('custom')}").model
    attention = model.get_submodule("transformer.resblocks.0.attn")
    x = torch.randn(2, 8, 32)
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
    additive = torch.zeros(8, 8).masked_fill(hidden, float("-inf"))
    assert torch.equal(attention(x, attn_mask=hidden), attention(x, attn_mask=additive))
    torch.testing.assert_close(attention(x, attn_mask=hidden)[:, :1], attention(x[:, :1]), rtol=0, atol=1e-5)


def test_splitting_twice_changes_nothing_more(clip_dir: MakeDir) -> None:
    model = load_clip(f"local-dir:{clip_dir()}").model
    before = [id(module) for module in model.modules()]
    assert [id(module) for module in split_attention(model).modules()] == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_are_six_per_layer_in_both_towers(architecture: str, clip_dir: MakeDir) -> None:
    model = load_clip(f"local-dir:{clip_dir(architecture)}").model
    targets = adapter_targets(model)
    assert list(targets) == [f"{t}.{i}.{p}" for t in ("image", "text") for i in range(2) for p in PROJECTIONS]
    linears = {id(parent.get_submodule(attribute)) for parent, attribute in targets.values()}
    assert len(linears) == 24
    assert all(isinstance(m, nn.Linear) for m in model.modules() if id(m) in linears)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_block_is_on_the_path_of_the_output(
    architecture: str, kind: str, clip_dir: MakeDir, batch: Batch
) -> None:
    model = load_clip(f"local-dir:{clip_dir(architecture)}").model
    attach_adapter(adapter_targets(model), rank=2, kind=kind)  # pyright: ignore[reportArgumentType]
    image, text, scale = model(*batch)
    (scale * image @ text.T).diagonal().sum().backward()
    assert [name for name, block in blocks(model).items() if not gradient(block, "lowrank.lora_B").any()] == []


def test_vit_b_16_has_144_targets_and_the_paper_sizes() -> None:
    with torch.device("meta"):
        model = split_attention(open_clip.create_model("ViT-B-16", device="meta"))
    assert len(adapter_targets(model)) == 144
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 149_620_737
    assert sum(n for name, n in sizes.items() if not inside_layers(name)) == 26_737_665


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_train_rest_chooses_what_trains_beside_the_adapters(clip_dir: MakeDir) -> None:
    model = load_clip(f"local-dir:{clip_dir()}").model
    attach_adapter(adapter_targets(model), rank=2, kind="dora", select=["image.0.q_proj"])
    prefix = "visual.transformer.resblocks.0.attn.q_proj."
    adapter = {prefix + name for name in ("lowrank.lora_A", "lowrank.lora_B", "magnitude", "gate.score")}

    assert set(apply_trainable(model, "none", "dora")) == trainable(model) == adapter
    apply_trainable(model, "proj_ln", "dora")
    norms = {f"{n}.{p}" for n in ("visual.ln_pre", "visual.ln_post", "ln_final") for p in ("weight", "bias")}
    assert trainable(model) - adapter == norms | {"visual.proj", "text_projection", "logit_scale"}
    apply_trainable(model, "all", "dora")
    embeddings = {"visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding"}
    embeddings |= {"token_embedding.weight", "positional_embedding"}
    assert trainable(model) - adapter == norms | embeddings | {"visual.proj", "text_projection", "logit_scale"}
    with pytest.raises(ConfigError, match="train_rest='some'"):
        apply_trainable(model, "some", "lora")


def test_proj_ln_finds_the_nested_text_tower(clip_dir: MakeDir) -> None:
    model = load_clip(f"local-dir:{clip_dir('nested')}").model
    names = set(rest_parameters(model, "proj_ln"))
    assert {"text.ln_final.weight", "text.text_projection.weight", "text.text_projection.bias"} <= names
    assert not any("embedding" in name for name in names)


def test_full_fine_tuning_trains_every_weight(clip_dir: MakeDir) -> None:
    model = load_clip(f"local-dir:{clip_dir()}").model
    apply_trainable(model, "none", "none")
    assert trainable(model) == set()
    apply_trainable(model, "none", "full")
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["flat", "custom"])
def test_model_runs_in_bf16(architecture: str, clip_dir: MakeDir, batch: Batch) -> None:
    model = load_clip(f"local-dir:{clip_dir(architecture)}").model
    exact = model(*batch)
    attach_adapter(adapter_targets(model), rank=2, kind="dora")
    low = model.bfloat16()(batch[0].bfloat16(), batch[1])
    for a, b in zip(low, exact, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_gradient_checkpointing_changes_no_gradient(clip_dir: MakeDir, batch: Batch) -> None:
    model = load_clip(f"local-dir:{clip_dir()}").model
    attach_adapter(adapter_targets(model), rank=2, kind="dora")
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)  # pyright: ignore[reportCallIssue]
        model.zero_grad()
        image, text, scale = model(*batch)
        (scale * image @ text.T).diagonal().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=0, atol=1e-6, msg=name)
