"""A SigLIP from start to end: trained under the sigmoid loss over ranks, restored, exported and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pipeline.config import ConfigError, load_config
from pipeline.handoff.export import export
from pipeline.handoff.served_run import build_served, labels_of
from pipeline.handoff.source import read_source
from pipeline.model.export import clip_logits, fixed_batch
from pipeline.tracking.served.served import example_image, load_served, predict
from pipeline.training.model import attach_blocks, load_untouched, objective_of

LABELS = "train.positives=class"


def test_a_siglip_is_trained_exported_and_served(launch: Any, siglip_dir: Path, tmp_path: Path) -> None:
    run = launch(
        f"model.name={siglip_dir}",
        "train.steps=4",
        "adapter.towers=[image, text, pool]",
        "keep.weight=3",
        "keep.batch_size=8",
    )
    assert run.wait() == [0, 0], run.text()
    records = [json.loads(line) for line in (run.directory / "journal.jsonl").read_text().splitlines()]
    losses = [r["values"] for r in records if r["kind"] == "metrics" and "train/task" in r["values"]]
    assert len(losses) == 4
    assert all(values["train/logit_bias"] < -9 and values["train/logit_scale"] > 115 for values in losses)
    source = read_source(run.directory)
    assert len(source.gate_map) == 30
    logits = clip_logits(source.model.model, *fixed_batch(source.model))
    assert export(run.directory, "open_clip", tmp_path / "export").difference is not None
    stock: Any = open_clip.create_model(f"local-dir:{tmp_path / 'export'}", require_pretrained=True).eval()
    torch.testing.assert_close(stock.get_logits(*fixed_batch(source.model))[0], logits, rtol=1e-5, atol=1e-4)
    with pytest.raises(ConfigError, match="transformers' CLIPModel has no"):
        export(run.directory, "peft", tmp_path / "peft")

    labels, _ = labels_of(source, load_config(run.directory / "config.yaml"), ["cat", "red dog"], ["a photo of a {c}"])
    served = load_served(build_served(source, labels, {}, tmp_path / "stage"))
    picture = example_image()
    (row,) = predict(served, {"image": [picture]})
    (image,) = (torch.tensor(each["embedding"]) for each in predict(served, {"image": [picture]}, task="embed_images"))
    assert labels is not None
    scale, bias = (source.model.model.get_parameter(f"logit_{name}") for name in ("scale", "bias"))
    wanted = (scale.exp() * labels.head @ image + bias).sigmoid().tolist()
    assert dict(zip(row["labels"], row["scores"], strict=True)) == pytest.approx(
        dict(zip(["cat", "red dog"], wanted, strict=True)), rel=1e-3
    )


def test_the_loss_follows_the_logit_bias_unless_it_is_chosen(config_file: Path, siglip_dir: Path) -> None:
    """Under the contrastive loss a logit bias has a gradient of zero and stays in the graph, so every rank has it."""
    siglip = f"model.name={siglip_dir}"
    cases = [([], False), ([siglip], True), ([siglip, "train.loss=contrastive"], False)]
    for overrides, sigmoid in cases:
        config = load_config(config_file, overrides)
        model = attach_blocks(config, load_untouched(config))
        objective = objective_of(config, model)
        assert objective._task.sigmoid == sigmoid  # pyright: ignore
        tokens = model.tokenizer(["a cat", "dog"])  # pyright: ignore
        images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
        objective(images, tokens, 0)["total"].backward()
        grad = getattr(model.model, "logit_bias", None)
        if overrides:
            assert grad is not None and grad.grad is not None
            assert bool(grad.grad.any()) == sigmoid
    with pytest.raises(ConfigError, match="train.loss: sigmoid is for a CLIP"):
        load_config(config_file, ["train.loss=sigmoid", "model.name=timm:vit_tiny_patch16_224"])


@pytest.mark.slow
def test_a_clip_gets_a_bias_that_fits_its_first_batch(launch: Any, tmp_path: Path) -> None:
    """It starts where the loss of the first step is least over the bias, is trained, and travels with the export."""
    run = launch("train.loss=sigmoid", "train.steps=3", "train.warmup_steps=0", world=1)
    assert run.wait() == [0], run.text()
    start = float(run.text().partition("gets one, which starts at ")[2].split()[0])
    source = read_source(run.directory)
    assert source.found.state["model"]["added_bias"] == start
    bias = source.model.model.get_parameter("logit_bias")
    assert 0 < abs(float(bias) - start) < 0.01
    export(run.directory, "open_clip", tmp_path / "export")
    stock: Any = open_clip.create_model(f"local-dir:{tmp_path / 'export'}", require_pretrained=True)
    assert torch.equal(stock.logit_bias, bias.squeeze())
    with pytest.raises(ConfigError, match="has no init_logit_bias"):
        export(run.directory, "hf", tmp_path / "hf")
    graphs = export(run.directory, "onnx", tmp_path / "onnx")
    assert graphs.difference is not None and graphs.difference < 1e-3
    with pytest.raises(ConfigError, match="logit_bias"):
        export(run.directory, "peft", tmp_path / "peft")
    again = launch("train.loss=sigmoid", "train.steps=3", "train.warmup_steps=0", world=1)
    assert again.wait() == [0], again.text()
