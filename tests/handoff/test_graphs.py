"""ONNX and Triton exports, run by onnxruntime on its own and compared with the run's merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from pipeline.cli import main
from pipeline.config import ConfigError
from pipeline.data.images import decode as decode_image
from pipeline.data.images import eval_resize, normalize
from pipeline.handoff import graphs
from pipeline.handoff import readback as stock
from pipeline.handoff.export import export
from pipeline.handoff.graphs import GraphOptions
from pipeline.handoff.source import Mismatch
from pipeline.model.restore import load_run
from pipeline.tracking.served.served import Labels
from pipeline.vectors.embedder import load_embedder

TEXTS = ["a photo of a cat.", "two red shoes on a wooden floor", "it’s “NEW” &amp; blue"]


@pytest.fixture(scope="module")
def toy_run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one layer a tower, on which an export takes seconds."""
    root = tmp_path_factory.mktemp("toy")
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    config["preprocess_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (root / "clip").mkdir()
    (root / "clip/open_clip_config.json").write_text(json.dumps(config))
    return make_run(directory=root / "run", changes=(f"model.name=local-dir:{root / 'clip'}",))


def run_graph(file: Path, **inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(file))
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@torch.no_grad()
def own(clip: Any, pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit vectors of uint8 images and of texts by the run's model."""
    normal = normalize(pixels, clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"])
    found = clip.model.encode_image(normal), clip.model.encode_text(clip.tokenizer(texts))
    return torch.nn.functional.normalize(found[0], dim=-1), torch.nn.functional.normalize(found[1], dim=-1)


def pixels_for(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def labels_for(clip: Any, *names: str, template: str = "a {c}.") -> Labels:
    names = names or ("shoe", "hat", "coat")
    texts = [template.format(c=name) for name in names]
    return Labels(list(names), [template], own(clip, pixels_for(1, clip.preprocess_cfg["size"][0]), texts)[1])


def test_onnxruntime_reads_both_towers_and_the_head(toy_run: Path, tmp_path: Path) -> None:
    """One Triton repository is the same graphs in other places, so it covers both."""
    from tokenizers import Tokenizer

    clip = load_run(toy_run)
    report = export(toy_run, "triton", tmp_path / "out", graph=lambda _: GraphOptions(labels=labels_for(clip)))
    assert report.difference is not None and report.difference < 1e-3
    assert "onnxruntime" in str(report.verified_by)
    pixels = pixels_for(5, 16)
    images, texts = own(clip, pixels, TEXTS)
    found = run_graph(tmp_path / "out/image/1/model.onnx", pixels=pixels)
    assert (found - images).abs().max() < 1e-5
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    ids = torch.zeros(3, 16, dtype=torch.int64)
    for row, text in enumerate(TEXTS):
        read = tokenizer.encode(text).ids
        ids[row, : len(read)] = torch.tensor(read)
    assert (run_graph(tmp_path / "out/text/1/model.onnx", input_ids=ids) - texts).abs().max() < 1e-5
    logits = run_graph(tmp_path / "out/head/1/model.onnx", image_embeds=found)
    wanted = clip.model.get_parameter("logit_scale").exp() * images @ labels_for(clip).head.T
    assert (logits - wanted).abs().max() < 1e-3
    assert json.loads((tmp_path / "out/preprocessor_config.json").read_text())["do_normalize"] is False
    check_repository(tmp_path / "out")
    by_run, by_graphs = load_embedder(str(toy_run)), load_embedder(str(tmp_path / "out"))
    assert (by_run.images(pixels) - by_graphs.images(pixels)).abs().max() < 1e-5
    assert (by_run.texts(TEXTS) - by_graphs.texts(TEXTS)).abs().max() < 1e-5


def check_repository(root: Path) -> None:
    """The configs name the graphs' own inputs and outputs, and the ensemble leads from pixels to logits."""
    text = {name: (root / name / "config.pbtxt").read_text() for name in ("image", "text", "head", "classify")}
    assert 'name: "pixels" data_type: TYPE_UINT8 dims: [ 3, 16, 16 ]' in text["image"]
    assert 'name: "input_ids" data_type: TYPE_INT64 dims: [ 16 ]' in text["text"]
    assert 'label_filename: "labels.txt"' in text["head"]
    assert 'platform: "ensemble"' in text["classify"] and (root / "classify/1").is_dir()
    assert (root / "classify/labels.txt").read_text().split() == ["shoe", "hat", "coat"]


@pytest.mark.slow
def test_another_models_graphs_are_refused(toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that normalizes twice gives other vectors; nothing is left."""

    def write(model: Any, to: str, directory: Path, options: GraphOptions) -> list[str]:
        changed = model.preprocess_cfg | {"mean": [0.1, 0.9, 0.5]}
        return real(__import__("dataclasses").replace(model, preprocess_cfg=changed), to, directory, options)

    from pipeline.handoff import export as module

    real = graphs.write_graph_export
    monkeypatch.setattr(module, "write_graph_export", write)
    with pytest.raises(Mismatch, match="onnxruntime gives cosines of .* nothing was left"):
        export(toy_run, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_options_of_other_formats_and_missing_packages(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(toy_run), out, "--to", "hf", "--int8"]) == 2
    assert "--int8 needs --to onnx" in capsys.readouterr().err
    assert main(["export", str(toy_run), out, "--to", "onnx", "--limit", "3"]) == 2
    assert "need --int8" in capsys.readouterr().err
    monkeypatch.setattr(stock.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"written without onnx .*selora\[onnx\]'`$"):
        export(toy_run, "onnx", tmp_path / "out", verify=False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_demos_model_in_every_precision(
    precision: Any, make_run: Callable[..., Path], benchmark: Path, photo: bytes, tmp_path: Path
) -> None:
    """Twelve layers, real pixels, normalized by the caller."""
    run = make_run("lora", True)
    clip = load_run(run)
    arguments = ["export", str(run), str(tmp_path / "out"), "--to", "onnx", "--pixels", "normalized"]
    more = {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8", "--benchmark", str(benchmark)]}[precision]
    assert main([*arguments, *more]) == 0
    facts = json.loads((tmp_path / "out/selora.json").read_text())
    pixels = eval_resize(decode_image(photo, form="reference"), clip.preprocess_cfg)[None]
    normal = normalize(pixels, clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"])
    found = run_graph(tmp_path / "out/image.onnx", pixels=normal)
    cosine = float((found * own(clip, pixels, TEXTS)[0]).sum())
    assert cosine > (0.9999 if precision != "int8" else 0.95)
    assert len(json.loads((tmp_path / "out/labels.json").read_text())["class_names"]) == 10
    sizes = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.onnx"))
    whole = sum(parameter.numel() for parameter in clip.model.parameters()) * 4
    assert sizes < {"fp32": 1.1, "fp16": 0.6, "int8": 0.8}[precision] * whole
    losses = facts.get("loss_of_8_bits", [])
    assert [row["dataset"] for row in losses] == (["ours", "others"] if precision == "int8" else [])
    assert np.isfinite([row["after"] for row in losses]).all()


@pytest.mark.slow
def test_a_siglips_graphs_are_its_own(siglip_dir: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    """The pooling of its image tower, its whole texts, the bias in its head, and its own tokenizer's files."""
    from transformers import AutoTokenizer

    run = make_run(directory=tmp_path / "run", changes=(f"model.name={siglip_dir}",))
    clip: Any = load_run(run)
    labels = labels_for(clip, "cat", "dog", "red", template="a {c}")
    report = export(run, "onnx", tmp_path / "out", graph=lambda _: GraphOptions(labels=labels))
    assert report.difference is not None and report.difference < 1e-3
    assert any("HFTokenizer" in note for note in report.notes)
    pixels, texts = pixels_for(5, 32), ["a photo of a cat", "red dog"]
    images, wanted = own(clip, pixels, texts)
    found = run_graph(tmp_path / "out/image.onnx", pixels=pixels)
    assert (found - images).abs().max() < 1e-5
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=8, truncation=True).input_ids
    assert (run_graph(tmp_path / "out/text.onnx", input_ids=ids) - wanted).abs().max() < 1e-5
    logits = clip.model.get_parameter("logit_scale").exp() * images @ labels.head.T + clip.model.logit_bias
    assert float(clip.model.logit_bias) < -9
    assert (run_graph(tmp_path / "out/head.onnx", image_embeds=found) - logits).abs().max() < 1e-3
