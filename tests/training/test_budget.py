"""A run with `gate.budget`: exactly that many active blocks, on all ranks, under every stage and through a resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.training.checkpoint import latest_checkpoint

BUDGET = ("gate.lam=0", "train.steps=16", "train.checkpoint_every=3", "train.keep_last=9")


def open_blocks(run_dir: Path) -> set[str]:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    found = {name for name, gate in checkpoint.state["gate_map"].items() if gate["open"]}
    assert found == set(checkpoint.state["budget"]["open"])
    return found


@pytest.mark.parametrize(
    ("stage", "kind", "step"),
    [
        pytest.param(0, "lora", 2, marks=pytest.mark.slow),
        (1, "dora", 5),
        pytest.param(2, "lora", 9, marks=pytest.mark.slow),
        pytest.param(3, "dora", 5, marks=pytest.mark.slow),
    ],
)
def test_exactly_k_stay_and_a_resume_is_exact(launch, stage: int, kind: str, step: int) -> None:
    """Killed with everything open, while the number falls, and with the set fixed; one rank chooses the same blocks."""
    options = (*BUDGET, "gate.budget=5", f"train.zero_stage={stage}", f"adapter.kind={kind}")
    straight = launch(*options, "name=straight")
    assert straight.wait() == [0, 0], straight.text()
    killed = launch(*options, "name=killed")
    killed.signal_at(step, signal.SIGKILL, rank=0)
    killed.wait()
    again = launch(*options, "name=killed")
    assert again.wait() == [0, 0], again.text()
    assert again.losses() == straight.losses()
    assert len(open_blocks(straight.directory)) == 5
    assert open_blocks(again.directory) == open_blocks(straight.directory)
    alone = launch(*options, "name=alone", "train.gates_every=1", world=1)
    assert alone.wait() == [0], alone.text()
    assert open_blocks(alone.directory) == open_blocks(straight.directory)
    counts = active_blocks(alone.directory)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 5


def active_blocks(run_dir: Path) -> list[float]:
    """The number of open blocks as the journal records it."""
    records = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [r["values"]["adapter/active_blocks"] for r in records if "adapter/active_blocks" in r.get("values", {})]


@pytest.mark.slow
def test_a_share_of_the_blocks_may_stay(launch) -> None:
    run = launch(*BUDGET, "gate.budget=0.25", world=1)
    assert run.wait() == [0], run.text()
    assert len(open_blocks(run.directory)) == 6


def test_more_blocks_than_there_are_is_a_mistake(launch) -> None:
    run = launch(*BUDGET, "gate.budget=1000", world=1)
    assert run.wait() == [2]
    assert "gate.budget=1000: must be between 1 and the" in run.text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate.budget=3"], "both decide which blocks close; set gate.lam=0"),
        (["gate.budget=3", "gate.enabled=false"], "^gate.budget: 3 needs gates: .*no adapter.random_k$"),
        (["gate.budget_parameters=300"], "both decide which blocks close; set gate.lam=0"),
        (["gate.budget=3", "gate.budget_parameters=300", "gate.lam=0"], "give one of them"),
        (["gate.budget=2.5", "gate.lam=0"], "whole number of blocks, or a share below 1"),
        (["gate.budget=3", "gate.lam=0", "gate.settle_steps=4"], "closed blocks leave by themselves"),
    ],
)
def test_settings_that_contradict_a_budget_are_refused(config_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, overrides)
