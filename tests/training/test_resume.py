"""Kill, resume, resume elsewhere: the losses and the weights are those of the undisturbed run."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file

from pipeline.training.checkpoint import latest_checkpoint


def test_a_killed_rank_costs_nothing_but_time(launch, undisturbed) -> None:
    killed_and_continued(launch, undisturbed, "data.workers=1")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_killed_rank_costs_nothing_under_any_stage(launch, stage: int) -> None:
    common = ("data.workers=1", f"train.zero_stage={stage}")
    whole = launch("name=undisturbed", *common)
    assert whole.wait() == [0, 0], whole.text()
    killed_and_continued(launch, whole, *common)


def killed_and_continued(launch, undisturbed, *common: str) -> None:
    """Kill a run at its sixth step and start it again: it ends as the undisturbed one, to the bit."""
    killed = launch("name=killed", *common)
    killed.signal_at(6, signal.SIGKILL, rank=1)
    codes = killed.wait()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    interrupted = latest_checkpoint(killed.directory)
    assert interrupted is not None
    assert interrupted.step < 12
    resumed = launch("name=killed", *common)
    assert resumed.wait() == [0, 0], resumed.text()
    assert f"continuing at step {interrupted.step} of 12" in resumed.text()
    assert resumed.losses() == undisturbed.losses()
    assert len(resumed.losses()) == 12
    for name in ("trainable", "optimizer"):
        ours, theirs = (
            load_file(run.directory / f"checkpoints/step-00000012/{name}.safetensors") for run in (resumed, undisturbed)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_ranks_and_another_stage(launch, undisturbed, world: int) -> None:
    stopped = launch("name=moved")
    stopped.signal_at(5, signal.SIGTERM, rank=0)
    assert stopped.wait() == [0, 0], stopped.text()
    assert "stopped by a signal" in stopped.text()
    moved = launch("name=moved", "train.zero_stage=3" if world == 4 else "train.zero_stage=0", world=world)
    assert moved.wait() == [0] * world, moved.text()
    expected, found = undisturbed.losses(), moved.losses()
    assert found.keys() == expected.keys()
    # Sums over another number of ranks round otherwise; the batches are the same.
    assert all(found[step] == pytest.approx(expected[step], abs=2e-5) for step in expected)


def test_a_finished_run_is_not_trained_again(launch) -> None:
    first = launch("train.steps=4", world=1)
    assert first.wait() == [0], first.text()
    again = launch("train.steps=4", world=1)
    assert again.wait() == [0]
    assert "already trained for 4 steps" in again.text()


def test_all_stages_take_the_same_steps(launch) -> None:
    runs = {stage: launch(f"name=stage{stage}", "train.steps=3", f"train.zero_stage={stage}") for stage in (0, 1, 2, 3)}
    losses = {}
    for stage, run in runs.items():
        assert run.wait() == [0, 0], run.text()
        losses[stage] = run.losses()
    for stage in (1, 2, 3):
        assert all(losses[stage][step] == pytest.approx(losses[0][step], abs=1e-6) for step in losses[0])
