"""From a sweep with a floor to a registered model at its strength, all real but Ray."""

from __future__ import annotations

import json

import pytest
from sweep_by_hand import lay_out

from pipeline.cli import main
from pipeline.runs.results import read_floors, read_summary, reported_at
from pipeline.tracking.mlflow.registry import Registry

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GRID = "grid: {rank: [2], lam: [0.3]}\nfloor: %s\n"
NAME = "gated_lora_r2_lam0.3"


def test_a_sweep_with_a_floor_is_promoted_at_its_strength(
    make_config, make_grid, by_hand, known, tmp_path, capsys
) -> None:
    """The version has the weights of α, the results on the images it was not chosen on, and tags that say so."""
    config = make_config(f"eval.benchmark={known}")
    sweep_dir, store = tmp_path / "runs" / "sweep", f"sqlite:///{tmp_path / 'mlflow.db'}"
    lay_out(config, make_grid(GRID % 0.8))
    by_hand(sweep_dir, NAME, world=1)
    run_dir = sweep_dir / "trials" / NAME
    floors = read_floors(run_dir / "eval")
    assert floors is not None
    at = floors["floors"]["0.8"]
    assert 0 < at["alpha"] < 1, at
    assert main(["promote", str(sweep_dir), "--name", "own", "--uri", store]) == 0
    told = capsys.readouterr().out
    assert f"at strength {at['alpha']:g}" in told
    assert "on the images it was chosen on" in told
    tags, summary = Registry(store, "own").tags("1"), read_summary(run_dir / reported_at(at["alpha"]))
    assert tags["selora.strength"] == f"{at['alpha']:g}"
    assert tags["selora.floor"] == "kept >= 0.8"
    assert tags["selora.choosing_digest"] == floors["choosing_digest"]
    assert tags["selora.weights_digest"] == summary["model_digest"]
    whole = json.loads((run_dir / "eval" / "summary.json").read_text())
    assert tags["selora.weights_digest"] != whole["model_digest"]
    assert (float(tags["selora.id"]), float(tags["selora.kept"])) == (at["id"], at["kept"])


def test_a_floor_that_no_trial_keeps_is_told_in_a_line(
    make_config, make_grid, by_hand, known, tmp_path, capsys
) -> None:
    config = make_config(f"eval.benchmark={known}", "train.lr=1.0", "train.warmup_steps=0")
    sweep_dir, store = tmp_path / "runs" / "sweep", f"sqlite:///{tmp_path / 'mlflow.db'}"
    lay_out(config, make_grid(GRID % 1.0))
    by_hand(sweep_dir, NAME, world=1)
    floors = read_floors(sweep_dir / "trials" / NAME / "eval")
    assert floors is not None and floors["floors"]["1.0"]["alpha"] == 0
    assert main(["promote", str(sweep_dir), "--name", "own", "--uri", store]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{sweep_dir}: no trial keeps 1 at any strength above 0" in line
    assert "lower the floor, or train with reference data" in line
