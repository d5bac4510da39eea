"""The README's five commands, on a folder of images that nobody prepared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from pipeline.demo.assets import MODEL, asset


def selora(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_from_a_folder_to_results_and_a_tracked_run(
    image_folder: Callable[..., Path], tmp_path: Path, repository: Path
) -> None:
    photos, test_photos = image_folder(classes=3, each=20, size=64), image_folder(classes=3, each=5, size=64, seed=1)
    assert "3 classes" in selora("inspect", photos, cwd=repository)
    selora("pack", photos, tmp_path / "shards", cwd=repository)
    assert "60" in selora("verify", tmp_path / "shards", cwd=repository)
    settings = (
        f"model.name=local-dir:{asset(MODEL)}",
        "model.pretrained=null",
        f"data.train={tmp_path / 'shards'}",
        f"out={tmp_path / 'runs'}",
        "train.steps=3",
        "train.warmup_steps=1",
        "train.global_batch_size=16",
        "data.streams=8",
        "data.workers=0",
    )
    said = selora("train", "configs/own_data.yaml", *settings, cwd=repository)
    assert "step 3/3" in said
    assert "no gate can close" in said
    selora("pack", test_photos, tmp_path / "eval/photos", "--eval", "--templates", "simple", cwd=repository)
    benchmark = tmp_path / "benchmark.yaml"
    benchmark.write_text(
        yaml.safe_dump(
            {"name": "own", "root": "eval", "datasets": [{"key": "photos", "group": "id", "path": "photos"}]}
        )
    )
    run = tmp_path / "runs" / "own_data"
    text = selora("evaluate", run, "--benchmark", benchmark, cwd=repository)
    assert "photos" in text
    assert json.loads((run / "eval" / "photos.json").read_text())["n"] == 15
    assert "skipped" in selora("evaluate", run, "--benchmark", benchmark, cwd=repository)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("selora")
    assert experiment is not None
    (record,) = client.search_runs([experiment.experiment_id])
    assert record.info.status == "FINISHED"
    assert {"train/loss", "eval/photos/acc1", "adapter/active_blocks"} <= record.data.metrics.keys()
    assert record.data.params["adapter.kind"] == "lora"
    names = {entry.path for entry in client.list_artifacts(record.info.run_id)}
    assert {"config.yaml", "gate_map.json", "eval"} <= names
