"""Gates that settle in a run: shut blocks do not change, on all ranks, under every stage and through a resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.training.checkpoint import latest_checkpoint

# Scores leave 0.15 at 0.01 a step: about half of the gates are shut when the run is half over.
FALLING = ("gate.lr=0.01", "gate.lam=30", "gate.settle_margin=0.01", "train.steps=16", "adapter.kind=dora")
SETTLE = "gate.settle_steps=2"


def metrics(run_dir: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [each["values"][name] for each in records if each["kind"] == "metrics" and name in each["values"]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_settled_block_rests_and_a_resume_is_exact(launch, stage: int) -> None:
    common = (*FALLING, SETTLE, f"train.zero_stage={stage}", "train.keep_last=4")
    undisturbed = launch("name=undisturbed", *common)
    assert undisturbed.wait() == [0, 0], undisturbed.text()
    counts = metrics(undisturbed.directory, "adapter/settled_blocks")
    assert counts == sorted(counts)
    assert counts[-1] > 0

    stopped = launch("name=stopped", *common)
    stopped.signal_at(10, signal.SIGTERM, rank=0)
    assert stopped.wait() == [0, 0], stopped.text()
    middle = latest_checkpoint(stopped.directory)
    assert middle is not None
    shut = middle.state["settling"]["settled"]
    assert shut
    assert middle.step < 16
    resumed = launch("name=stopped", *common)
    assert resumed.wait() == [0, 0], resumed.text()
    assert resumed.losses() == undisturbed.losses()
    ends = [latest_checkpoint(run.directory) for run in (resumed, undisturbed)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].state["settling"] == ends[1].state["settling"]
    for name in ("trainable", "optimizer"):
        ours, theirs = (load_file(end.path / f"{name}.safetensors") for end in ends if end is not None)
        assert all(ours[key].equal(theirs[key]) for key in theirs)

    before = load_file(middle.path / "trainable.safetensors")
    after, moments = (load_file(ends[0].path / f"{name}.safetensors") for name in ("trainable", "optimizer"))
    where = {"image": "visual.transformer", "text": "transformer"}
    for target in shut:
        tower, layer, projection = target.split(".")
        place = projection if projection.endswith("proj") else {"fc1": "c_fc", "fc2": "c_proj"}[projection]
        own = [
            name
            for name in after
            if name.startswith(f"{where[tower]}.resblocks.{layer}.") and f".{place}." in name
            if ("attn." in name) == projection.endswith("proj")
        ]
        assert len(own) == 4, own
        assert all(after[name].equal(before[name]) for name in own)
        assert not any(moments[f"{name}/{moment}"].any() for name in own for moment in ("exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_a_run_in_which_nothing_is_left_to_train_says_so(launch) -> None:
    run = launch(*FALLING, SETTLE, "train.train_rest=none", "gate.lam=1000", world=1)
    assert run.wait() == [2], run.text()
    assert "every gate has settled" in run.text()
