"""Bases from the first step to an export and its results: families, another image size, and one that no rank holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file
from torch import Tensor

from pipeline.data.images import normalize
from pipeline.evaluation import command
from pipeline.handoff.export import export
from pipeline.model.clip import load_clip
from pipeline.model.export import clip_logits, fixed_batch, write_hf
from pipeline.model.restore import find_run, load_base, load_run
from pipeline.training.checkpoint import latest_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from families import OPEN_CLIP, toy_clip

pytestmark = pytest.mark.slow
CLIPS = {family.example: family for family in OPEN_CLIP if family.refused is None}
VITS = (
    "vit_small_patch14_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_small_plus_patch16_dinov3",
    "eva02_tiny_patch14_224",
)


@pytest.fixture(scope="module")
def benchmark(image_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four classes of the training set, in other images."""
    from pipeline.data.eval.wds_layout import pack_eval

    root = tmp_path_factory.mktemp("benchmark")
    pack_eval(image_folder(classes=4, each=4, size=40), root / "ours", templates="simple", workers=1)
    (root / "benchmark.yaml").write_text("name: tiny\ndatasets:\n  - {key: ours, group: id, path: ours}\n")
    return root / "benchmark.yaml"


def finish(run: Any, to: tuple[str, ...], benchmark: Path, out: Path) -> None:
    """The run has ended well; it is exported, read back by the library, and evaluated."""
    assert run.wait() == [0] * len(run.processes), run.text()
    losses = run.losses()
    assert losses[max(losses)] < losses[min(losses)]
    for library in to:
        report = export(run.directory, library, out / library)
        assert report.difference is not None
        assert report.difference <= report.tolerance
    summary = command.evaluate_model(run.directory, benchmark, workers=0)
    assert summary["datasets"]["ours"]["value"] is not None


@pytest.mark.parametrize("example", CLIPS)
def test_clips(example: str, launch: Any, trunk_dir: Any, word_tokenizer: Any, benchmark: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    toy_clip(CLIPS[example], base, trunk_dir, word_tokenizer, vocabulary=49408)
    finish(launch(f"model.name={base}", "train.steps=20", world=1), ("open_clip",), benchmark, tmp_path)


@pytest.mark.parametrize("example", VITS)
def test_vits(example: str, launch: Any, trunk_dir: Any, benchmark: Path, tmp_path: Path) -> None:
    run = launch(f"model.name=timm:local-dir:{trunk_dir(example)}", "train.steps=20", "train.train_rest=none", world=1)
    finish(run, ("timm",), benchmark, tmp_path)


def test_a_base_of_transformers(launch: Any, tiny_clip: Path, benchmark: Path, tmp_path: Path) -> None:
    write_hf(load_clip(str(tiny_clip)), tmp_path / "base")
    run = launch(f"model.name={tmp_path / 'base'}", "train.steps=20", world=1)
    finish(run, ("open_clip", "hf", "peft"), benchmark, tmp_path)
    assert load_base(find_run(run.directory)).digest == load_clip(str(tiny_clip)).digest


def test_another_image_size_is_kept_everywhere(launch: Any, benchmark: Path, tmp_path: Path) -> None:
    """96 pixels from a base of 64, in each export what the run's model gives."""
    from pipeline.handoff.served_run import build_served, labels_of
    from pipeline.handoff.source import read_source

    base = tmp_path / "base"
    base.mkdir()
    toy_clip(CLIPS["ViT-B-16"], base, lambda *_: base, lambda _: None, vocabulary=49408)
    config = json.loads((base / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"image_size": 64, "patch_size": 16}
    (base / "open_clip_config.json").write_text(json.dumps(config))
    run = launch(f"model.name={base}", "model.image_size=96", "train.steps=20", "data.templates=simple", world=1)
    finish(run, ("open_clip", "hf", "peft", "onnx"), benchmark, tmp_path)
    model = load_run(run.directory)
    pixels = torch.randint(0, 256, (4, 3, 96, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tokens = fixed_batch(model)[1]
    wanted = clip_logits(model.model, normal := normalize(pixels, **stats(model)), tokens)
    for name, found in logits_by_libraries(tmp_path, pixels, normal, tokens).items():
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    source = read_source(run.directory)
    labels, _ = labels_of(source, command.load_config(run.directory / "config.yaml"), None, None)
    build_served(source, labels, {}, tmp_path / "stage")  # compares what it serves with the run's model


def stats(model: Any) -> dict[str, Any]:
    """Mean and standard deviation of a model's pixels."""
    return {name: model.preprocess_cfg[name] for name in ("mean", "std")}


@torch.no_grad()
def logits_by_libraries(exports: Path, pixels: Tensor, normal: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """(images, texts) logits of each export by its library, which must have read the image size from its files."""
    from open_clip import create_model_from_pretrained
    from transformers import CLIPImageProcessor, CLIPModel

    loaded: Any = create_model_from_pretrained(f"local-dir:{exports / 'open_clip'}")
    stock, preprocess = loaded
    assert preprocess.transforms[0].size in (96, (96, 96))
    theirs: Any = CLIPModel.from_pretrained(exports / "hf").eval()
    for library in ("hf", "onnx"):
        processor: Any = CLIPImageProcessor.from_pretrained(exports / library)
        assert (processor.crop_size["height"], processor.crop_size["width"]) == (96, 96)
    scale = stock.logit_scale.exp()
    image, text = (InferenceSession(str(exports / "onnx" / f"{name}.onnx")) for name in ("image", "text"))
    (images,), (texts,) = image.run(None, {"pixels": pixels.numpy()}), text.run(None, {"input_ids": tokens.numpy()})
    return {
        "open_clip": clip_logits(stock.eval(), normal, tokens),
        "hf": theirs(pixel_values=normal, input_ids=tokens).logits_per_image,
        "onnx": scale * torch.from_numpy(images) @ torch.from_numpy(texts).T,
    }


def test_ranks_take_the_base_from_rank_0(launch: Any, tiny_clip: Path) -> None:
    """Under ZeRO-3 the others never read it; what they train is what one rank trains."""
    stage = ("train.zero_stage=3", "adapter.kind=dora", "train.steps=6")
    runs = [launch(*stage, f"name=of_{world}", world=world) for world in (1, 2)]
    assert [run.wait() for run in runs] == [[0], [0, 0]], runs[1].text()
    one, two = (latest_checkpoint(run.directory) for run in runs)
    assert one is not None and two is not None
    assert one.state["base_digest"] == two.state["base_digest"]
    saved = [load_file(each.path / "trainable.safetensors") for each in (one, two)]
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=0, atol=2e-4, msg=name)
