"""The mean of several fine-tuned models is exactly that of their merged weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.method.adapter import blocks
from pipeline.method.linear import Block, DoRALinear
from pipeline.model.restore import find_run, load_adapted, load_run
from pipeline.model.soup import mean_weights, state_of_mean
from pipeline.training.checkpoint import save_checkpoint


@pytest.fixture
def two(tmp_path: Path, make_run: Callable[..., Path]) -> Callable[[str], list[Path]]:
    """two(kind) -> two runs of one base that moved apart."""
    return lambda kind: [
        make_run(tmp_path / "a", kind=kind, steps=(20,)),
        make_run(tmp_path / "b", kind=kind, steps=(10, 20)),
    ]


def merged_by_hand(block: Block) -> Tensor:
    """W0 + s B A in fp64 (paper eq. 2); for DoRA with rows of the length m (its eq. 6); W0 behind a closed gate."""
    start = block.base.weight.double()
    if block.gate is not None and float(block.gate.score) < block.gate.threshold:
        return start
    moved = start + block.lowrank.scaling * block.lowrank.lora_B.double() @ block.lowrank.lora_A.double()
    if isinstance(block, DoRALinear):
        moved = block.magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True)
    return moved


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_blocks_are_merged_before_they_are_averaged(two, kind: str) -> None:
    runs = two(kind)
    adapted = [dict(blocks(load_adapted(find_run(run)).model)) for run in runs]
    mean = mean_weights(runs)
    plain = dict(load_run(runs[0]).model.named_parameters())
    for target in adapted[0]:
        by_hand = torch.stack([merged_by_hand(each[target]) for each in adapted]).mean(dim=0)
        fits = [name for name, value in plain.items() if value.shape == by_hand.shape]
        assert any(torch.allclose(mean[name].double(), by_hand, rtol=0, atol=1e-6) for name in fits), target
    a, b = ([each[target].lowrank for target in adapted[0]] for each in adapted)
    product = (a[0].lora_B + b[0].lora_B) @ (a[0].lora_A + b[0].lora_A) / 4
    assert not torch.allclose(product, (a[0].lora_B @ a[0].lora_A + b[0].lora_B @ b[0].lora_A) / 2, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_mean_is_a_run_that_loads_as_such(two, tmp_path: Path, kind: str) -> None:
    runs, out = two(kind), tmp_path / "soup"
    out.mkdir()
    (out / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    mean = mean_weights(runs)
    save_checkpoint(out, mean, {}, state_of_mean(runs), keep_last=1)
    soup, (one, other) = load_run(out), [dict(load_run(run).model.named_parameters()) for run in runs]
    for name, value in soup.model.named_parameters():
        assert torch.equal(value, ((one[name].double() + other[name].double()) / 2).float()), name
    assert any(not torch.equal(one[name], other[name]) for name in mean)


def test_runs_of_different_bases_have_no_mean(two, tmp_path: Path, make_run, trained_clip_dir: Path) -> None:
    other = make_run(tmp_path / "c", model=trained_clip_dir)
    with pytest.raises(ConfigError, match="soup: .* and .* started from different weights"):
        state_of_mean([*two("lora"), other])
