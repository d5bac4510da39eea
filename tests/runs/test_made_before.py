"""Runs and sweeps of the previous version continue with this one.

made_before.tar.gz was made by the commit that precedes options with effects, all paths relative: runs/single, stopped
at step 7 of 12; runs/search with one finished trial, one stopped at step 7, and the others waiting, two of them named
alike, so that the second has a suffix from its digest; its config.yaml, grid.yaml, shards, benchmark and model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

COMMANDS = """
import shlex, sys
from pipeline.cli import main
for line in sys.argv[1:]:
    code = main(shlex.split(line))
    assert code == 0, f"{line}: {code}"
"""
SWEEP = """
import sys
from pathlib import Path
from pipeline.config import load_config
from pipeline.tuning.grid import load_grid
from pipeline.tuning.trial import run_trial
from sweep_by_hand import lay_out
lay_out(load_config("config.yaml", ["name=search", "data.workers=1", "train.log_every=2"]), load_grid("grid.yaml"))
print(run_trial(Path("runs/search").absolute(), "gated_lora_r2_lam1"))
"""


@pytest.fixture
def before(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).with_name("made_before.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def python(before: Path, repository: Path, code: str, *arguments: str) -> str:
    """What a process in that directory prints on both streams."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(repository), str(repository / "tests")])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=before, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def steps(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "metrics" and "train/loss" in line["values"]]


def test_run_made_before_continues_to_the_registry(before: Path, repository: Path) -> None:
    """Also with other options that affect speed alone, on which the earlier version's lists disagreed."""
    said = python(
        before,
        repository,
        COMMANDS,
        "train config.yaml data.workers=1 train.log_every=2",
        "evaluate runs/single",
        "report runs/single",
        "promote runs/single --name single --uri sqlite:///mlflow.db",
    )
    run_dir = before / "runs" / "single"
    assert "continuing at step 7 of 12" in said
    assert steps(run_dir) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert json.loads((run_dir / "eval" / "summary.json").read_text())["groups"].keys() == {"id", "shift"}
    assert "gated LoRA" in (run_dir / "report" / "report.html").read_text()
    assert "runs/single registered as single version 1" in said


def test_sweep_made_before_continues_to_the_registry(before: Path, repository: Path) -> None:
    sweep_dir = before / "runs" / "search"
    old = json.loads((sweep_dir / "sweep.json").read_text())["trials"]
    assert "status='finished', step=12" in python(before, repository, SWEEP)
    new = json.loads((sweep_dir / "sweep.json").read_text())["trials"]
    assert [(one["id"], one["name"]) for one in new] == [(one["id"], one["name"]) for one in old]
    assert steps(sweep_dir / "trials" / "gated_lora_r2_lam1") == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    said = python(
        before, repository, COMMANDS, "report runs/search", "promote runs/search --name best --uri sqlite:///mlflow.db"
    )
    assert "gated LoRA r2 λ0.3" in (sweep_dir / "report" / "report.html").read_text()
    assert "registered as best version 1" in said
