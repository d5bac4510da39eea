"""Row 15: the operations that a training step hands to a GPU, counted on shapes, for selora, PEFT and full fine-tuning.

An eager step of a small batch takes as long as its kernels take to launch, whatever they compute. Views and empty
tensors launch nothing and are left out. No device is needed: the step runs on shapes alone, and every block goes the
way that it goes on a GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from measure import Line, Ratio
from subjects import PEFT_TARGETS, gates_of, own, peft_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.clip import Clip, load_clip
from pipeline.model.towers import adapter_targets, apply_trainable
from pipeline.training.objective import Contrastive, KeepSettings, Objective, PenaltySettings

LAYERS, BATCH, TEXT = 12, 256, 16
# They make no kernel: views, and memory that is only set aside.
_NO_KERNEL = {
    *("_unsafe_view", "detach", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


def toy_config(layers: int) -> dict:
    """ViT-B/16 with few words."""
    return {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": layers, "width": 768, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 512, "width": 512, "heads": 8, "layers": layers},
    }


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not views and name not in _NO_KERNEL:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@cache
def toy(layers: int) -> Clip:
    """ViT-B/16 of so many layers in each tower, on shapes alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": toy_config(layers), "preprocess_cfg": {}})
        )
        clip = load_clip(f"local-dir:{folder}", seed=0)
    clip.model.to("meta")
    return clip


def subject(kind: str, who: str, layers: int, rank: int = 16) -> nn.Module:
    """The toy with blocks of selora or of PEFT, or all of it trainable."""
    net = deepcopy(toy(layers).model)
    if kind == "full":
        apply_trainable(net, "none", "full")
        return net
    if who == "selora":
        own(net, adapter_targets(net), rank, kind)
        apply_trainable(net, "none", kind)
        return net
    net = peft_of(net, PEFT_TARGETS, rank, kind)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return net


def step_kernels(kind: str, who: str, *, layers: int = LAYERS, keep: bool = False) -> Counter[str]:
    """Kernels of the forward and backward of one step, the loss and the gates' penalty included."""
    penalty = PenaltySettings("l1", "mean", 1.0, 0.1, 0)
    net = subject(kind, who, layers)
    objective = Objective(
        net,
        Contrastive(),
        gates_of(net),
        penalty,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        precision="fp32",
        keep=KeepSettings(1.0, 0.0) if keep else None,
    ).to("meta")
    images = torch.empty(BATCH, 3, 224, 224, dtype=torch.uint8, device="meta")
    tokens = torch.empty(BATCH, TEXT, dtype=torch.long, device="meta")
    with Kernels() as counted:
        objective(images, tokens, 0)["total"].backward()
    return counted.found


def launches(_rounds: int) -> list[Line]:
    """The row: counts, which no other load disturbs."""
    found = {
        f"{who} {kind}": step_kernels(kind, who).total() for kind in ("lora", "dora") for who in ("selora", "PEFT")
    }
    found["full"] = step_kernels("full", "").total()
    lines = []
    for kind in ("lora", "dora"):
        ratio = found[f"selora {kind}"] / found[f"PEFT {kind}"]
        note = ", ".join(f"{name} {count:,}" for name, count in found.items()) if kind == "lora" else ""
        what = f"selora {kind} / PEFT {kind}"
        lines.append(Line(15, f"launches-{kind}-r16", what, Ratio(ratio, ratio, ratio), 1.0, False, "", note))
    return lines


if __name__ == "__main__":
    for kind, who in (("lora", "selora"), ("lora", "PEFT"), ("dora", "selora"), ("dora", "PEFT"), ("full", "")):
        counts = step_kernels(kind, who)
        print(f"{who} {kind}: {counts.total():,}", dict(counts.most_common(14)))
