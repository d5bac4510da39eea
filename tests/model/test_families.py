"""Each family of open_clip and timm at toy size: split, blocks, steps, merge, and the weights back in the library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.method.adapter import AdapterKind, GradientWatch, attach_adapter, blocks, gate_scores, merge_adapter
from pipeline.model.clip import load_clip
from pipeline.model.towers import adapter_targets, apply_trainable
from pipeline.model.vit import load_vit
from pipeline.model.weights import stock_state
from pipeline.training.model import check_trainable

sys.path.insert(0, str(Path(__file__).parent))
from families import OPEN_CLIP, TIMM, Family, render, toy_clip

ROOT = Path(__file__).parents[2]


def each(families: list[Family]) -> list[Any]:
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(family, id=family.example, marks=marks[family.slow]) for family in families]


def check(model: Any, run: Callable[[Any], tuple[Tensor, ...]], fresh: Any) -> None:
    """Blocks on every target: closed they change no bit, two steps reach all of them, merged they compute the same.

    fresh: the library's own module of this architecture; it takes the weights and computes the same.
    """
    part = model.trunk if hasattr(model, "trunk") else model

    def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))

    model.eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # away from starts such as a LayerScale of 1e-5
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    with torch.no_grad():  # with gradients, attention takes another kernel where a mask trains
        before = run(model)
    fresh.load_state_dict(stock_state(part))
    assert same(run(fresh.eval()), before), "split as the library has it in one"
    targets = adapter_targets(model)
    halves: dict[AdapterKind, list[str]] = {"lora": list(targets)[::2], "dora": list(targets)[1::2]}
    for kind, names in halves.items():
        attach_adapter(targets, rank=2, kind=kind, select=names)
    apply_trainable(model, "none", "lora")
    with torch.no_grad():
        for score in gate_scores(model):
            score.fill_(0.05)
        for block in blocks(model).values():
            nn.init.normal_(block.lowrank.lora_B, std=0.02)
        assert all(torch.equal(a, b) for a, b in zip(run(model), before, strict=True)), "closed gates"
        for score in gate_scores(model):
            score.fill_(0.2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        watch = GradientWatch(model)
        torch.stack([(each - old).cos().sum() for each, old in zip(run(model), before, strict=True)]).sum().backward()
        watch.check()
        optimizer.step()
    trained = run(model)
    assert not same(trained, before)
    merge_adapter(model)
    assert same(run(model), trained), "merged"
    fresh.load_state_dict(stock_state(part))
    assert same(run(fresh), trained), "in the library again"


@pytest.mark.parametrize("family", each(TIMM))
def test_vits_of_timm(family: Family, trunk_dir: Callable[..., Path]) -> None:
    directory = trunk_dir(family.example, **family.toy)
    name = f"timm:local-dir:{directory}"
    if family.refused is not None:
        with pytest.raises(ConfigError, match=family.refused):
            adapter_targets(load_vit(name).model)
        return
    vit = load_vit(name)
    images = torch.randn(2, 3, *vit.preprocess_cfg["size"], generator=torch.Generator().manual_seed(1))
    fresh = timm.create_model(f"local-dir:{directory}", num_classes=0)
    check(vit.model, lambda model: (model.trunk(images) if hasattr(model, "trunk") else model(images),), fresh)


def targets_for_training(directory: Path) -> dict[str, Any]:
    clip = load_clip(str(directory))
    check_trainable(clip)
    return adapter_targets(clip.model)


@pytest.mark.parametrize("family", each(OPEN_CLIP))
def test_clips_of_open_clip(
    family: Family, trunk_dir: Callable[..., Path], word_tokenizer: Callable[[Path], None], tmp_path: Path
) -> None:
    toy_clip(family, tmp_path, trunk_dir, word_tokenizer)
    if family.refused is not None:
        with pytest.raises(ConfigError, match=family.refused):
            targets_for_training(tmp_path)
        return
    clip = load_clip(str(tmp_path))
    check_trainable(clip)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *clip.preprocess_cfg["size"], generator=generator)
    tokens = torch.randint(3, 58, (2, 8), generator=generator)
    fresh = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False, pretrained_text=False)
    check(clip.model, lambda model: model(images, tokens)[:2], fresh)


def test_the_page_is_what_the_tables_say() -> None:
    """If this fails: `python tests/model/families.py > docs/bases.md`."""
    assert (ROOT / "docs" / "bases.md").read_text(encoding="utf-8") == render()
