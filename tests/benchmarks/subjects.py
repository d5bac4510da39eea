"""The measured models: one linear, a small CLIP, ViT-B/16, each with selora, PEFT and full fine-tuning.

PEFT works on the same open_clip modules with the same attention, so that nothing but the blocks differs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.contrastive import flyp_loss
from pipeline.method.gate import Gate, read_gates
from pipeline.model.clip import Clip, load_clip
from pipeline.model.towers import adapter_targets, apply_trainable

Step = Callable[[], object]
PEFT_TARGETS = r".*\.(q_proj|k_proj|v_proj|out_proj|c_fc|c_proj)"
SMALL_CLIP = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 384, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 2},
}


def own(net: nn.Module, targets: Any, rank: int, kind: str, *, gated: bool = True) -> nn.Module:
    """Blocks on all targets with B away from zero."""
    attach_adapter(targets, rank=rank, kind=kind, gated=gated)  # pyright: ignore[reportArgumentType]
    for block in blocks(net).values():
        nn.init.normal_(block.lowrank.lora_B, std=0.01)
    return net


def peft_of(net: nn.Module, targets: Any, rank: int, kind: str) -> nn.Module:
    """PEFT's blocks in the place of the same linears, in place."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=kind == "dora", target_modules=targets)
    peft.inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return net


def gates_of(net: nn.Module) -> list[Gate]:
    return [block.gate for block in blocks(net).values() if block.gate is not None]


class Linear:
    """Forward and backward of one linear over (batch, tokens, inputs), dx included."""

    def __init__(self, inputs: int, outputs: int, *, batch: int = 16, tokens: int = 197) -> None:
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(inputs, outputs))
        self.x = torch.randn(batch, tokens, inputs, requires_grad=True)
        self.grad = torch.randn(batch, tokens, outputs)

    def full(self) -> Step:
        return self._step(deepcopy(self.base))

    def own(self, rank: int, kind: str, *, gated: bool = True) -> Step:
        net = deepcopy(self.base)
        return self._step(own(net, {"block": (net, "0")}, rank, kind, gated=gated))

    def peft(self, rank: int, kind: str) -> Step:
        return self._step(peft_of(deepcopy(self.base), ["0"], rank, kind))

    def _step(self, net: nn.Module) -> Step:
        gates = gates_of(net)

        def step() -> None:
            self.x.grad = None
            net.zero_grad()
            read_gates(gates)
            net(self.x).backward(self.grad)

        return step


class SmallClip:
    """A training step of a CLIP of 2 + 2 layers under the FLYP loss, without the optimizer; embeddings train."""

    def __init__(self, *, batch: int = 16) -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = {"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}
            (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
            self.clip: Clip = load_clip(f"local-dir:{folder}", seed=0)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, 3, 224, 224, generator=generator)
        self.tokens = torch.randint(1, 49000, (batch, 77), generator=generator)
        self.tokens[:, 20] = 49407

    def full(self) -> nn.Module:
        model = deepcopy(self.clip.model)
        apply_trainable(model, "all", "full")
        return model

    def own(self, rank: int, kind: str, *, open_share: float | None = None) -> nn.Module:
        """`open_share`: that share of the blocks is open, spread evenly, and all gates are settled for good."""
        model = deepcopy(self.clip.model)
        own(model, adapter_targets(model), rank, kind)
        apply_trainable(model, "all", kind)
        gates = gates_of(model)
        if open_share is not None:
            number = max(1, round(open_share * len(gates)))
            chosen = {index * len(gates) // number for index in range(number)}
            for index, gate in enumerate(gates):
                gate.score.requires_grad_(False)
                if index not in chosen:
                    nn.init.zeros_(gate.score)
        return model

    def peft(self, rank: int, kind: str) -> nn.Module:
        model = peft_of(deepcopy(self.clip.model), PEFT_TARGETS, rank, kind)
        for name, parameter in model.named_parameters():
            if ".resblocks." not in name:
                parameter.requires_grad_(True)
        return model

    def step(self, model: nn.Module) -> Step:
        gates = gates_of(model)

        def step() -> None:
            model.zero_grad()
            read_gates(gates)
            self.loss(model).backward()

        return step

    def loss(self, model: nn.Module) -> Tensor:
        image, text, scale = model(self.images, self.tokens)
        return flyp_loss(image, text, scale)


def vit_b_16() -> Any:
    """ViT-B/16 with random weights, split attention, and one layer of its text tower: images alone are encoded."""
    model: Any = load_clip("ViT-B-16", seed=0).model
    del model.transformer.resblocks[1:], model.token_embedding
    return model


def features(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, 512, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(50.0, requires_grad=True)
