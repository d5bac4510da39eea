"""timm's ViTs: splitting changes nothing, adapters are in the right places, and timm reads the saved files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pipeline.config import ConfigError
from pipeline.method.adapter import attach_adapter, blocks, merge_adapter
from pipeline.model.towers import adapter_targets, apply_trainable, inside_layers
from pipeline.model.vit import load_vit, save_timm, untagged
from pipeline.model.weights import stock_state

CLASSES = ("cat", "dog", "bird")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True}, {"init_values": 0.5}, {"global_pool": "avg", "class_token": False}]
)
def test_features_are_timms_own_and_the_directory_is_read_again(
    vit_dir: Callable[..., Path], images: torch.Tensor, changes: dict[str, Any]
) -> None:
    directory = vit_dir(**changes)
    stock = timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=0).eval()
    vit = load_vit(f"timm:local-dir:{directory}")
    vit.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(vit.model.encode_image(images), stock(images), atol=1e-6, rtol=1e-5)
    assert {name: t.shape for name, t in stock_state(vit.model.trunk).items()} == {
        name: t.shape for name, t in stock.state_dict().items()
    }
    assert all(torch.equal(t, stock.state_dict()[name]) for name, t in stock_state(vit.model.trunk).items())
    assert vit.preprocess_cfg["mean"] == (0.4, 0.5, 0.6)
    assert (vit.preprocess_cfg["size"], vit.classes) == ((32, 32), None)


def test_six_blocks_a_layer_and_the_head_trains_with_them(vit_dir: Callable[..., Path]) -> None:
    vit = load_vit(f"timm:local-dir:{vit_dir()}", classes=CLASSES)
    assert apply_trainable(vit.model, "none", "none") == ["head.weight", "head.bias"], "the linear probe"
    targets = adapter_targets(vit.model)
    assert len(targets) == 18
    assert list(targets)[:6] == [f"image.0.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")]
    attach_adapter(targets, rank=2, kind="lora")
    names = apply_trainable(vit.model, "none", "lora")
    assert [name for name in names if not inside_layers(name)] == ["head.weight", "head.bias"]
    assert sum(".lora_A" in name for name in names) == 18
    rest = [name for name in apply_trainable(vit.model, "proj_ln", "lora") if not inside_layers(name)]
    assert sorted(rest) == ["head.bias", "head.weight", "trunk.norm.bias", "trunk.norm.weight"]
    every = [name for name in apply_trainable(vit.model, "all", "lora") if not inside_layers(name)]
    assert {"trunk.pos_embed", "trunk.cls_token", "trunk.patch_embed.proj.weight"} <= set(every)


def test_a_plan_needs_no_weights() -> None:
    names = ("timm:vit_small_patch16_224.dino", "timm:local-dir:/a.b", "ViT-B-16.x")
    assert [untagged(name) for name in names] == ["timm:vit_small_patch16_224", *names[1:]]


def test_the_digest_is_that_of_the_trunk_whatever_the_classifier(vit_dir: Callable[..., Path]) -> None:
    name = f"timm:local-dir:{vit_dir()}"
    assert len({load_vit(name, classes=c, seed=s).digest for c, s in ((None, 0), (CLASSES, 0), (CLASSES[:2], 7))}) == 1
    assert load_vit("timm:vit_tiny_patch16_224", seed=1).digest != load_vit("timm:vit_tiny_patch16_224").digest
    first, second = (load_vit(name, classes=CLASSES, seed=4).model.head for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.weight, second.weight)


def test_what_is_written_is_read_by_timm_with_its_classifier(
    vit_dir: Callable[..., Path], images: torch.Tensor, tmp_path: Path
) -> None:
    vit = load_vit(f"timm:local-dir:{vit_dir()}", classes=CLASSES)
    attach_adapter(adapter_targets(vit.model), rank=2, kind="dora")
    for block in blocks(vit.model).values():
        torch.nn.init.normal_(block.lowrank.lora_B)
    vit.model.eval()
    with torch.no_grad():
        expected = vit.model(images)
        merge_adapter(vit.model)
        save_timm(vit, tmp_path / "out")
        stock: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(stock(images), expected, atol=1e-5, rtol=1e-4)
    again = load_vit(f"timm:local-dir:{tmp_path / 'out'}")
    assert again.digest != vit.digest
    assert again.preprocess_cfg == vit.preprocess_cfg
    assert stock.pretrained_cfg["num_classes"] == 3


def test_a_weight_file_of_dinos_own_layout_is_loaded(vit_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = vit_dir()
    vit = load_vit(f"timm:local-dir:{directory}")
    torch.save(stock_state(vit.model.trunk), tmp_path / "dino.pth")
    (directory / "model.safetensors").unlink()
    assert load_vit(f"timm:local-dir:{directory}").digest != vit.digest, "a random start"
    assert load_vit(f"timm:local-dir:{directory}", str(tmp_path / "dino.pth")).digest == vit.digest


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("timm:vit_smal_patch16_224", None, r"model.name='timm:vit_smal.*near: vit_small_patch16_224"),
        ("timm:local-dir:/nowhere", None, "no config.json in that directory"),
        (
            "timm:vit_tiny_patch16_224",
            "openai",
            "with a timm: model it must be a weight file; model.pretrained=null takes",
        ),
        ("timm:resnet18", None, "its image tower is not a plain transformer"),
        ("timm:beit_base_patch16_224", None, "attention of type Attention has no split form here"),
    ],
)
def test_wrong_names_are_refused(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_vit(name, pretrained)
