"""The temperature stays at or below 100: in the loss, in its gradient, and in every stored value."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.training.checkpoint import latest_checkpoint
from pipeline.training.objective import Contrastive

BOUND = torch.tensor(math.log(100.0))


@pytest.fixture
def hot_clip(tmp_path: Path, tiny_clip: Path) -> Path:
    """The tiny CLIP with exp(logit_scale) = 148."""
    folder = tmp_path / "hot"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text((tiny_clip / "open_clip_config.json").read_text())
    [weights] = tiny_clip.glob("*.safetensors")
    save_file(load_file(weights) | {"logit_scale": torch.tensor(5.0)}, folder / weights.name)
    return folder


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_stored_scale_is_capped_and_can_come_down(launch, hot_clip: Path, stage: int) -> None:
    """Adam moves it by 0.001 a step, so a value that was not clamped would still be far above the bound."""
    run = launch(
        f"model.name=local-dir:{hot_clip}", f"train.zero_stage={stage}", "train.steps=4", "train.warmup_steps=0"
    )
    assert run.wait() == [0, 0], run.text()
    checkpoint = latest_checkpoint(run.directory)
    assert checkpoint is not None
    stored = load_file(checkpoint.path / "trainable.safetensors")["logit_scale"]
    assert BOUND - 0.01 < stored < BOUND


@pytest.mark.parametrize(("matching", "sign"), [(True, 0), (False, 1)])
def test_gradient_at_the_bound_only_pulls_down(matching: bool, sign: int) -> None:
    """Features that match want a sharper softmax and get none; features that do not lower the scale."""
    noise = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.normalize(1 + 0.05 * noise, dim=1)
    texts = images if matching else images.roll(1, 0)
    logit_scale = torch.full((1,), 5.0, requires_grad=True)
    losses = Contrastive().losses((images, texts, logit_scale.exp()), torch.zeros(8), None)
    losses["task"].backward()
    assert losses["logit_scale"] == 100
    assert logit_scale.grad is not None
    assert logit_scale.grad.sign().item() == sign
