"""A base that has moved: the run reports it, takes the new place with --base, and keeps it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import main
from pipeline.config import Config, ConfigError, load_config, override, to_yaml
from pipeline.model.clip import load_clip
from pipeline.model.restore import find_run, load_base, load_run, move_base
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.cluster.distributed import read_world
from pipeline.training.model import attach_blocks, checkpoint_state, load_untouched, trainable
from pipeline.training.settings import changed_settings


@pytest.fixture
def run(clip_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose config names its base, tmp_path/base, by a relative path."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    shutil.copytree(clip_dir("flat", text_cfg=text), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"name": "run", "out": str(tmp_path), "model.name": "local-dir:base", "adapter.rank": 2}
    config = override(Config.model_validate({"data": {"train": "shards"}}), changes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(to_yaml(config))
    model = attach_blocks(config, load_untouched(config))
    saved = {name: parameter.detach() for name, parameter in trainable(model.model)}
    state = checkpoint_state(config, model, "0" * 64, 5, read_world({}))
    save_checkpoint(tmp_path / "run", saved, {"moment": torch.zeros(1)}, state, keep_last=1)
    return tmp_path / "run"


def test_a_run_finds_its_base_from_any_directory(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_run(run).name == f"local-dir:{tmp_path / 'base'}"


def test_a_moved_base_is_given_once_and_remembered(run: Path, tmp_path: Path, capsys: Any) -> None:
    digest = load_base(find_run(run)).digest
    (tmp_path / "base").rename(tmp_path / "new")
    with pytest.raises(ConfigError, match=r"its base .*base is not there; .* --base PATH"):
        load_run(run)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "open_clip", "--base", "new"]) == 0
    assert load_run(run).name == f"local-dir:{tmp_path / 'new'}"
    assert load_base(find_run(run)).digest == digest
    (tmp_path / "new").rename(tmp_path / "newer")
    move_base(run, tmp_path / "newer")
    assert load_run(run).name == f"local-dir:{tmp_path / 'newer'}"
    (tmp_path / "newer").rename(tmp_path / "base")
    assert load_run(run).name == f"local-dir:{tmp_path / 'base'}"


def test_other_weights_are_not_taken_for_the_base(run: Path, tmp_path: Path, clip_dir: Callable[..., Path]) -> None:
    (tmp_path / "base").rename(tmp_path / "new")
    config = load_clip(str(tmp_path / "new")).model_cfg
    shutil.copytree(tmp_path / "new", tmp_path / "other")
    (tmp_path / "other/open_clip_model.safetensors").unlink()
    assert config["embed_dim"] == 16
    with pytest.raises(ConfigError, match="was trained on base weights"):
        move_base(run, tmp_path / "other")
    with pytest.raises(ConfigError, match="its base"):
        load_run(run)


def test_a_training_continues_with_the_new_place_of_its_base(run: Path, tmp_path: Path) -> None:
    """Another model.name is another setting only while the old base is where it was."""
    old = load_config(run / "config.yaml")
    assert changed_settings(old, load_config(run / "config.yaml", [f"model.name=local-dir:{tmp_path / 'base'}"])) == []
    new = load_config(run / "config.yaml", [f"model.name=local-dir:{tmp_path / 'new'}"])
    assert [line.split(":")[0].strip() for line in changed_settings(old, new)] == ["model.name"]
    (tmp_path / "base").rename(tmp_path / "new")
    assert changed_settings(old, new) == []
