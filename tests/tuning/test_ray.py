"""Real Ray, once: parallel trials, a worker killed during a run, and bit-equal results."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from sweep_by_hand import lay_out

GRID = (
    "grid: {rank: [2], lam: [0.3, 1.0]}\nresources: {workers: 2, cpus_per_worker: 0.5, eval_cpus: 0.5, concurrent: 1}\n"
)
NAMES = ("gated_lora_r2_lam0.3", "gated_lora_r2_lam1")


@pytest.mark.slow  # two minutes of CPU, of which Ray's own start takes most
@pytest.mark.timeout(3000)
def test_a_killed_worker_costs_the_sweep_nothing_but_time(command, make_config, make_grid, by_hand) -> None:
    common = ("train.steps=60", "train.checkpoint_every=5")
    sweep = command(make_config(*common), GRID).start()
    sweep.kill_rank_0(NAMES[0], step=7)
    assert sweep.wait() == 0, sweep.text()
    hand = command(make_config("name=hand", *common), GRID)  # never started: only its files are looked at
    lay_out(make_config("name=hand", *common), make_grid(GRID))
    for name in NAMES:
        by_hand(hand.directory, name)
        ours, theirs = sweep.run_dir(name), hand.run_dir(name)
        assert len(sweep.losses(name)) == 60
        assert sweep.losses(name) == hand.losses(name)
        for file in ("trainable", "optimizer"):
            one, other = (load_file(run / f"checkpoints/step-00000060/{file}.safetensors") for run in (ours, theirs))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        mine, other = (json.loads((run / "eval" / "summary.json").read_text()) for run in (ours, theirs))
        assert mine["groups"] == other["groups"]
    assert [sweep.statuses(name) for name in NAMES] == [
        ["SCHEDULED", "RUNNING", "RUNNING", "FINISHED"],
        ["SCHEDULED", "RUNNING", "FINISHED"],
    ]
    assert [sweep.state(name).status for name in NAMES] == ["finished", "finished"]
    assert NAMES[0] in sweep.text()
    # No token and no result folder, only what matplotlib keeps.
    assert {one.name for one in sweep.home.iterdir()} <= {".cache", ".config"}
