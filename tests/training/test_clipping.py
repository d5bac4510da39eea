"""The norm of the gradient is limited only by train.grad_clip; DeepSpeed's default of 1.0 is off."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file


def gradient_norm(directory: Path) -> float:
    """Of the first step: Adam's first moment is by then a tenth of the gradient."""
    state = load_file(directory / "checkpoints/step-00000001/optimizer.safetensors")
    return sum(float((value / 0.1).square().sum()) for name, value in state.items() if name.endswith("/exp_avg")) ** 0.5


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_gradients_are_clipped_only_by_the_config(launch, stage: int) -> None:
    """Gradients are clipped where the config says so and nowhere else."""
    common = ("adapter.kind=full", "train.steps=1", "train.warmup_steps=0", f"train.zero_stage={stage}")
    free, bound = launch("name=free", *common, world=1), launch("name=bound", *common, "train.grad_clip=0.5", world=1)
    assert free.wait() == [0], free.text()
    assert bound.wait() == [0], bound.text()
    assert gradient_norm(free.directory) > 1.1
    assert gradient_norm(bound.directory) == pytest.approx(0.5, rel=1e-3)
