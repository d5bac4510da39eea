"""The promotion of a sweep with a floor, all real but Ray."""

from __future__ import annotations

import pytest
from sweep_by_hand import lay_out

from pipeline.cli import main
from pipeline.runs.results import read_floors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GRID = "grid: {rank: [2], lam: [0.3]}\nfloor: %s\n"
NAME = "gated_lora_r2_lam0.3"


def test_a_floor_that_no_trial_keeps_is_told_in_a_line(
    make_config, make_grid, by_hand, known, tmp_path, capsys
) -> None:
    config = make_config(f"eval.benchmark={known}", "train.lr=1.0", "train.warmup_steps=0")
    sweep_dir, store = tmp_path / "runs" / "sweep", f"sqlite:///{tmp_path / 'mlflow.db'}"
    lay_out(config, make_grid(GRID % 1.0))
    by_hand(sweep_dir, NAME, world=1)
    floors = read_floors(sweep_dir / "trials" / NAME / "eval")
    assert floors is not None and floors["floors"]["1"]["alpha"] == 0
    assert main(["promote", str(sweep_dir), "--name", "own", "--uri", store]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{sweep_dir}: no trial keeps 1 at any strength above 0" in line
    assert "lower the floor, or train with reference data" in line
