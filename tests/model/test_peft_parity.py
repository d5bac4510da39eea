"""Open gated LoRA and DoRA against PEFT's on the Hugging Face CLIP of the same weights."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.contrastive import flyp_loss
from pipeline.method.linear import DoRALinear
from pipeline.model.clip import load_clip
from pipeline.model.towers import adapter_targets

RANK, ALPHA = 3, 6.0
NAMES = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def hf_name(name: str) -> str:
    """Parameter name of the split open_clip model -> of transformers.CLIPModel."""
    tower = "vision_model" if name.startswith("visual.") else "text_model"
    bare = name.removeprefix("visual.")
    if bare.startswith("transformer.resblocks."):
        _, _, index, rest = bare.split(".", 3)
        for ours, theirs in LAYER.items():
            if rest.startswith(f"{ours}."):
                return f"{tower}.encoder.layers.{index}.{theirs}{rest.removeprefix(ours)}"
    return {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "visual.proj": "visual_projection.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    }[name]


def hf_clip(model: nn.Module) -> transformers.CLIPModel:
    shared = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shared | {"vocab_size": 60, "max_position_embeddings": 8, "eos_token_id": 59, "bos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=shared | {"image_size": 16, "patch_size": 8}, projection_dim=16
    )
    hf = transformers.CLIPModel(config)
    state = {}
    for name, tensor in model.state_dict().items():
        renamed = hf_name(name)
        value = tensor.reshape(()) if name == "logit_scale" else tensor
        state[renamed] = value.T if renamed in ("visual_projection.weight", "text_projection.weight") else value
    missing = hf.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("position_ids" in name for name in missing.missing_keys)
    return hf


def hf_outputs(hf: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = hf(input_ids=texts, pixel_values=images)
    return out.image_embeds, out.text_embeds, hf.get_parameter("base_model.model.logit_scale").exp()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_open_blocks_equal_peft_in_outputs_and_gradients(
    kind: str, clip_dir: Callable[..., Path], batch: tuple[Tensor, Tensor]
) -> None:
    model = load_clip(f"local-dir:{clip_dir()}").model
    hf = peft.get_peft_model(
        hf_clip(model),
        peft.LoraConfig(
            r=RANK,
            lora_alpha=int(ALPHA),
            use_dora=kind == "dora",
            target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ),
    )
    attach_adapter(adapter_targets(model), rank=RANK, kind=kind, alpha=ALPHA)  # pyright: ignore[reportArgumentType]
    pairs = pair_parameters(model, hf)
    assert len(pairs) == 24 * (3 if kind == "dora" else 2)
    torch.manual_seed(7)
    with torch.no_grad():
        for ours, theirs in pairs.values():
            # B far from its zero start, magnitudes away from the norm
            ours.add_(torch.randn_like(ours), alpha=0.2)
            theirs.copy_(ours)

    ours_out, theirs_out = model(*batch), hf_outputs(hf, *batch)
    base = load_clip(f"local-dir:{clip_dir()}").model(*batch)
    assert (ours_out[0] - base[0]).abs().max() > 0.05  # the adapters matter
    for a, b in zip(ours_out, theirs_out, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=0, atol=1e-5)
    flyp_loss(*ours_out).backward()
    flyp_loss(*theirs_out).backward()
    for name, (ours, theirs) in pairs.items():
        assert ours.grad is not None, name
        assert ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def pair_parameters(model: nn.Module, hf: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Adapter parameters of ours and of PEFT's, block by block; both models carry the same targets."""
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for target, block in blocks(model).items():
        tower, index, projection = target.split(".")
        tower = {"image": "vision_model", "text": "text_model"}[tower]
        path = NAMES.get(projection, f"self_attn.{projection}")
        layer = hf.get_submodule(f"base_model.model.{tower}.encoder.layers.{index}.{path}")
        for ours, theirs in (("lora_A", "lora_A.default.weight"), ("lora_B", "lora_B.default.weight")):
            pairs[f"{target}.{ours}"] = (block.lowrank.get_parameter(ours), layer.get_parameter(theirs))
        if isinstance(block, DoRALinear):
            pairs[f"{target}.magnitude"] = (
                block.magnitude,
                layer.get_parameter("lora_magnitude_vector.default.weight"),
            )
    return pairs
