"""The same shards and the same model through clip_benchmark and through selora give the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.run import evaluate
from pipeline.model.clip import Clip, load_clip

BATCH = 8


@pytest.fixture(scope="module")
def clip(trained_clip_dir: Path) -> Clip:
    return load_clip(f"local-dir:{trained_clip_dir}")


@pytest.fixture(scope="module")
def results(clip: Clip, benchmark_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    evaluate(clip, load_benchmark(benchmark_file), out, Settings(batch_size=BATCH, workers=0))
    return {key: json.loads((out / f"{key}.json").read_text()) for key in ("ours", "moved", "few", "pairs")}


def reference_loader(clip: Clip, folder: Path) -> Any:
    """clip_benchmark's own dataset and loader with open_clip's own evaluation transform."""
    config = open_clip.transform.PreprocessCfg(**clip.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    task = "zeroshot_retrieval" if (folder / "dataset_type.txt").exists() else "zeroshot_classification"
    dataset = build_dataset(f"wds/{folder.name}", root=str(folder), transform=transform, split="test", task=task)
    loader: Any = torch.utils.data.DataLoader(dataset.batched(BATCH), batch_size=None, shuffle=False, num_workers=0)
    loader.dataset.classes, loader.dataset.templates = dataset.classes, dataset.templates
    return loader


@pytest.mark.parametrize(("key", "folder"), [("ours", "wds_id"), ("moved", "wds_shift"), ("few", "wds_few")])
def test_classification_equals_clip_benchmark(
    clip: Clip, results: dict[str, Any], datasets: Path, key: str, folder: str
) -> None:
    loader = reference_loader(clip, datasets / folder)
    expected = zeroshot_classification.evaluate(
        clip.model,
        loader,
        clip.tokenizer,
        loader.dataset.classes,
        loader.dataset.templates,
        device="cpu",
        amp=False,
    )
    # With fewer than five classes acc5 is nan there, which is no JSON, and null here.
    assert math.isnan(expected["acc5"]) == (key == "few")
    assert results[key]["metrics"] == {name: None if math.isnan(value) else value for name, value in expected.items()}
    assert 1 / len(loader.dataset.classes) < expected["acc1"] < 1, "the model must be neither blind nor perfect"


def test_retrieval_equals_clip_benchmark(clip: Clip, results: dict[str, Any], datasets: Path) -> None:
    loader = reference_loader(clip, datasets / "wds_pairs")
    expected = zeroshot_retrieval.evaluate(
        clip.model, loader, clip.tokenizer, device="cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    # Its mean is one of fp32 numbers, ours a count over a count.
    assert results["pairs"]["metrics"] == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["text_retrieval_recall@5"] < 1


def test_result_files_have_clip_benchmarks_shape_and_our_keys(results: dict[str, Any], clip: Clip) -> None:
    for key, result in results.items():
        assert result["dataset"] == key
        assert (result["model"], result["pretrained"], result["language"]) == (clip.name, None, "en")
        task = "zeroshot_retrieval" if key == "pairs" else "zeroshot_classification"
        assert result["task"] == task
        assert {"n", "seconds", "dataset_digest", "model_digest", "chance", "value"} <= result.keys()
    assert results["ours"]["chance"] == 1 / 12
    assert results["pairs"]["chance"] == pytest.approx((1 / 31 + 5 / 31) / 2)
    assert (results["ours"]["n"], results["pairs"]["n"]) == (57, 31)
    assert sum(count for _, _, count in results["ours"]["confusion"]) == 57
