"""The README's five commands, on an unprepared folder of images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.demo.assets import MODEL, asset


def selora(*arguments: object, cwd: Path) -> str:
    """A command in a process of its own, as training needs one."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """here("inspect", ..) -> what the command prints, run in this process."""
    monkeypatch.chdir(repository)

    def run(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err[-3000:]
        return printed.out + printed.err

    return run


def test_from_a_folder_to_results_and_a_tracked_run(
    image_folder: Callable[..., Path], here: Callable[..., str], tmp_path: Path, repository: Path
) -> None:
    photos, test_photos = image_folder(classes=3, each=20, size=64), image_folder(classes=3, each=5, size=64, seed=1)
    assert "3 classes" in here("inspect", photos)
    here("pack", photos, tmp_path / "shards")
    assert "60" in here("verify", tmp_path / "shards")
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
    log = selora("train", "configs/own_data.yaml", *settings, cwd=repository)
    assert "step 3/3" in log
    assert "no gate can close" in log
    here("pack", test_photos, tmp_path / "eval/photos", "--eval", "--templates", "simple")
    benchmark = tmp_path / "benchmark.yaml"
    benchmark.write_text(
        yaml.safe_dump(
            {"name": "own", "root": "eval", "datasets": [{"key": "photos", "group": "id", "path": "photos"}]}
        )
    )
    run = tmp_path / "runs" / "own_data"
    assert "photos" in here("evaluate", run, "--benchmark", benchmark)
    assert json.loads((run / "eval" / "photos.json").read_text())["n"] == 15
    assert "skipped" in here("evaluate", run, "--benchmark", benchmark)

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


def test_a_place_that_is_not_a_folder_is_an_error_message(
    image_folder: Callable[..., Path], here: Callable[..., str], tmp_path: Path, repository: Path
) -> None:
    here("pack", image_folder(classes=2, each=4, size=32), tmp_path / "shards")
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "pipeline", "train", "configs/own_data.yaml", f"data.train={tmp_path / 'shards'}"]
    command.append(f"out={tmp_path / 'file'}")
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2
    assert done.stderr == f"selora train: {tmp_path / 'file'}: File exists; give a place that you may read and write\n"


def test_a_batch_of_more_images_than_there_are_is_warned_of(repository: Path) -> None:
    from pipeline.config import load_config
    from pipeline.training.run import warnings_of

    config = load_config(repository / "configs" / "own_data.yaml", ["train.global_batch_size=128"])
    assert warnings_of(config, 1000, 128) == []
    (warning,) = warnings_of(config, 1000, 56)
    assert "train.global_batch_size=128 exceeds the 56 images" in warning
