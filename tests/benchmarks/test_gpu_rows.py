"""The GPU rows on the CPU, tiny: they run before a GPU is rented for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import gpu_rows
from measure import Line


@pytest.fixture
def tiny(tmp_path: Path) -> gpu_rows.Size:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return gpu_rows.Size(f"local-dir:{tmp_path}", batch=4, ranks=(2,), inference_batch=3)


def test_the_training_row_runs(tiny: gpu_rows.Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows.torch, "compile", lambda model: model)  # minutes, and of torch's own
    lines = gpu_rows.train_steps(2, "cpu", tiny)
    assert [line.what for line in lines if line.name == "train-dora-r2"] == [
        "PEFT eager / selora",
        "PEFT compiled / selora",
        "PEFT eager / selora eager",
        "selora / full compiled",
    ]
    assert all(line.row == 12 and line.value.value > 0 for line in lines)


def test_the_inference_row_runs(tiny: gpu_rows.Size) -> None:
    lines = gpu_rows.inference(2, "cpu", tiny)
    assert {line.name for line in lines} == {"inference-b1", "inference-b3"}
    rate = next(line for line in lines if line.what == "images a second, merged")
    assert rate.value.value > 0 and rate.target == 10_000


def test_a_known_card_has_its_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "_card", lambda device: "NVIDIA H100 80GB HBM3")
    times = gpu_rows.Times({"own": [0.1, 0.1]})
    [line] = gpu_rows._utilisation(12, "train", 10**13, times, gpu_rows.torch.device("cpu"))
    assert isinstance(line, Line)
    assert line.value.value == pytest.approx(2 * 10**13 / 0.1 / 989e12)


@pytest.mark.slow
def test_the_rows_need_neither_ray_nor_mlflow() -> None:
    code = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; import bench"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
