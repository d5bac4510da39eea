"""A machine that only exports and predicts needs neither Ray nor DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.handoff.export import export
from pipeline.tracking.served.served import Labels, example_image, save_served

SCRIPT = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "deepspeed"):
            raise ImportError(name + " is not installed")

sys.meta_path.insert(0, Refuse())
from pipeline.cli import main

run, out, served, photo = sys.argv[1:]
sys.exit(main(["export", run, "--to", "open_clip", out]) or main(["predict", served, photo]))
"""


def test_export_and_predict_work_without_ray_and_deepspeed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("lora", True)
    export(run, "open_clip", tmp_path / "model", verify=False)
    width = json.loads((tmp_path / "model" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"]
    labels = Labels(["cat", "dog"], ["a {c}."], torch.eye(2, width))
    (tmp_path / "stage").mkdir()
    served = save_served(tmp_path / "stage", tmp_path / "model", labels, {})
    (tmp_path / "photo.png").write_bytes(example_image())
    arguments = [run, tmp_path / "out", served, tmp_path / "photo.png"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "open_clip_config.json").is_file()
    assert f"{tmp_path / 'photo.png'}: " in done.stdout
