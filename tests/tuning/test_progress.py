"""The terminal's view of a sweep, from files of a running one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.runs.sweep import trial_dir, write_state
from pipeline.tuning.progress import describe, line_of, live_table, rows
from pipeline.tuning.trials import Trial, expand


@pytest.fixture
def sweep(make_config, make_grid, tmp_path: Path) -> tuple[Path, list[Trial]]:
    """One trial in mid-training, one evaluated, one that failed, one that has not begun."""
    trials = expand(make_config(), make_grid("grid: {rank: [2, 4, 8, 16]}"))
    training, finished, failed, _ = [trial_dir(tmp_path, trial.name) for trial in trials]
    for each in (training, finished, failed):
        each.mkdir(parents=True)
    values = {"train/loss": 2.5, "train/images_per_s": 32.0, "adapter/active_blocks": 6.0, "adapter/active_share": 0.25}
    record = {"seq": 1, "time_ms": 0, "kind": "metrics", "step": 4, "values": values}
    (training / "journal.jsonl").write_text(json.dumps(record) + "\n")
    write_state(training, status="training", total_steps=12)
    write_state(finished, status="finished", step=12, total_steps=12)
    summary = {"datasets": {}, "groups": {"id": {"mean": 0.5}}, "forgetting": 0.031}
    (finished / "eval").mkdir()
    (finished / "eval" / "summary.json").write_text(json.dumps(summary))
    write_state(failed, status="failed", step=3, total_steps=12, error="diverged: step 3: the loss is not finite")
    return tmp_path, trials


def test_plain_lines_say_step_loss_blocks_and_time_left(sweep) -> None:
    training, finished, failed, waiting = [line_of(row) for row in rows(*sweep)]
    assert training == "gated_lora_r2_lam1: training 4/12, loss 2.5000, active 6 (25%), 0:04 left"
    assert finished == "gated_lora_r4_lam1: finished 12/12, id 50.0, forgot 3.1"
    assert failed == "gated_lora_r8_lam1: failed 3/12, diverged: step 3: the loss is not finite"
    assert waiting == "gated_lora_r16_lam1: waiting 0/0"


def test_the_live_table_holds_every_trial_and_fits_a_terminal(sweep) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(live_table(rows(*sweep)))
    text = console.export_text()
    assert "2 of 4 trials over" in text
    for trial in sweep[1]:
        assert trial.name in text
    assert "6 (25%)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_final_table_gives_the_reason_of_every_failure(sweep) -> None:
    lines = describe(*sweep).splitlines()
    assert lines[0].split() == ["trial", "state", "step", "loss", "active", "id", "forgot"]
    assert lines[-1] == "gated_lora_r8_lam1 failed: diverged: step 3: the loss is not finite"
