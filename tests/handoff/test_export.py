"""Exports, read by the stock libraries and compared with the run's own merged model on the demo's test photos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from pipeline.config import ConfigError
from pipeline.handoff import readback as stock
from pipeline.handoff.export import export
from pipeline.handoff.source import Mismatch
from pipeline.model.export import CAPTIONS
from pipeline.model.load import as_clip
from pipeline.model.restore import find_run, load_base, load_run


@torch.no_grad()
def by_open_clip(directory: Path, batch: Any) -> Tensor:
    model: Any = open_clip.create_model(f"local-dir:{directory}", require_pretrained=True).eval()
    return model.get_logits(batch.images, batch.tokens)[0]


@torch.no_grad()
def by_transformers(model: Any, batch: Any) -> Tensor:
    return model.eval()(input_ids=batch.tokens, pixel_values=batch.images).logits_per_image


@pytest.mark.parametrize(
    ("kind", "pruned"),
    [
        pytest.param("lora", False, id="lora-full"),
        pytest.param("dora", True, id="dora-pruned"),
        pytest.param("lora", True, id="lora-pruned", marks=pytest.mark.slow),
        pytest.param("dora", False, id="dora-full", marks=pytest.mark.slow),
    ],
)
def test_three_libraries_read_the_same_model_from_its_exports(
    kind: str, pruned: bool, make_run: Callable[..., Path], batch: Any, tmp_path: Path
) -> None:
    run = make_run(kind, pruned)
    wanted = batch.logits(load_run(run))
    untouched = batch.logits(load_base(find_run(run)))
    assert (wanted - untouched).abs().max() > 1  # the adapters matter
    for to in ("open_clip", "hf", "peft"):
        export(run, to, tmp_path / to, verify=False)
    kept: Any = PeftModel.from_pretrained(CLIPModel.from_pretrained(tmp_path / "peft" / "base"), str(tmp_path / "peft"))
    found = {
        "open_clip": by_open_clip(tmp_path / "open_clip", batch),
        "transformers": by_transformers(CLIPModel.from_pretrained(tmp_path / "hf"), batch),
        "peft, adapters kept": by_transformers(kept, batch),
        "peft, merged by peft": by_transformers(kept.merge_and_unload(), batch),
    }
    for library, logits in found.items():
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4, msg=lambda text, of=library: f"{of}: {text}")


def test_a_peft_adapter_holds_the_open_blocks(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """A PEFT adapter holds the open blocks and a base that is the untouched model."""
    run = make_run("dora", True)
    report = export(run, "peft", tmp_path / "adapter", base_name="openai/clip-vit-base-patch16")
    assert report.difference is not None
    assert report.difference < 1e-4
    assert "peft" in str(report.verified_by)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    gates = json.loads((next(run.glob("checkpoints/step-*")) / "state.json").read_text())["gate_map"]
    assert len(config["target_modules"]) == sum(gate["open"] for gate in gates.values()) == 48
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 6, True)
    assert config["base_model_name_or_path"] == "openai/clip-vit-base-patch16"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 3 * 48
    facts = json.loads((tmp_path / "adapter/selora.json").read_text())
    assert facts["base_digest"] == load_base(find_run(run)).digest
    assert len(facts["adapter_digest"]) == 64
    assert facts["active_blocks"] == "48/144"
    assert not [file for file in (tmp_path / "adapter").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


def test_what_trained_outside_the_blocks_is_in_the_base(
    make_run: Callable[..., Path], batch: Any, tmp_path: Path
) -> None:
    """What trained outside the blocks goes into the base and is reported."""
    run = make_run("lora", True, "all")
    report = export(run, "peft", tmp_path / "adapter")
    assert any("train_rest=all" in note and "base/" in note for note in report.notes)
    base: Any = CLIPModel.from_pretrained(tmp_path / "adapter" / "base")
    wanted = batch.logits(load_run(run))
    moved = by_transformers(base, batch) - batch.logits(load_base(find_run(run)))
    assert moved.abs().max() > 1
    kept = by_transformers(PeftModel.from_pretrained(base, str(tmp_path / "adapter")), batch)
    torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"


def test_the_hf_directory_reads_inputs_as_open_clip_does(
    make_run: Callable[..., Path], photo: bytes, pixels_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    """The Hugging Face directory reads captions and images as open clip does."""
    import io

    from PIL import Image

    run = make_run("lora", True)
    export(run, "hf", tmp_path / "hf", verify=False)
    clip = as_clip(load_run(run), "the tokenizer")
    tokenizer: Any = CLIPTokenizer.from_pretrained(tmp_path / "hf")
    captions = [*CAPTIONS, "it's size XL, 50% off!", "a shirt " * 30]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    for ours, theirs in zip(clip.tokenizer(captions), ids, strict=True):
        end = int((ours == 49407).int().argmax()) + 1
        assert ours[:end].tolist() == theirs[:end].tolist()
    image = Image.open(io.BytesIO(photo)).resize((90, 120))
    out = io.BytesIO()
    image.save(out, "PNG")
    theirs = CLIPImageProcessor.from_pretrained(tmp_path / "hf")(images=image, return_tensors="pt")["pixel_values"]
    assert (theirs - pixels_of(out.getvalue(), clip)).abs().max() < 0.02


def test_an_export_that_reads_differently_leaves_nothing(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that its library reads differently leaves nothing."""
    from pipeline.model import hf_layout

    monkeypatch.setitem(hf_layout.LAYER, "ln_1", "layer_norm2")
    monkeypatch.setitem(hf_layout.LAYER, "ln_2", "layer_norm1")
    with pytest.raises(Mismatch, match="other logits"):
        export(make_run("lora", True), "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_told_before_anything_is_written(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("lora", True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    cases = [
        ({"to": "zip"}, "expected one of open_clip, hf, peft, onnx, triton, timm"),
        ({"to": "hf", "merged": False}, "kept adapters are --to peft"),
        ({"to": "peft", "merged": True}, "merged weights are --to hf"),
        ({"to": "hf", "base_name": "x"}, "only a PEFT adapter"),
        ({"to": "hf", "step": 7}, "no checkpoint step-00000007"),
        ({"to": "hf", "out": tmp_path / "full", "force": True}, "is not an export"),
    ]
    for request, message in cases:
        with pytest.raises(ConfigError, match=message):
            export(run, **{"out": tmp_path / "new", **request})
    monkeypatch.setattr(stock.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"selora\[export\].*--unverified"):
        export(run, "peft", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_closed_gates_and_full_fine_tuning_have_no_adapter(make_run: Callable[..., Path], tmp_path: Path) -> None:
    closed = make_run("lora", directory=tmp_path / "closed", changes=("adapter.targets=[image.1.q_proj]",), pruned=True)
    state = next(closed.glob("checkpoints/step-*")) / "trainable.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(state)
    save_file({name: t * 0 if name.endswith("score") else t for name, t in tensors.items()}, state)
    with pytest.raises(ConfigError, match="every gate is closed"):
        export(closed, "peft", tmp_path / "out", verify=False)
    none = make_run("none", directory=tmp_path / "none", train_rest="proj_ln")
    with pytest.raises(ConfigError, match="has no adapters"):
        export(none, "peft", tmp_path / "out", verify=False)
    report = export(none, "open_clip", tmp_path / "out")
    assert "read back by open_clip" in str(report)
    with pytest.raises(ConfigError, match="--force"):
        export(none, "hf", tmp_path / "out")
    export(none, "hf", tmp_path / "out", verify=False, force=True)
    assert json.loads((tmp_path / "out/selora.json").read_text())["verified_by"] is None
    assert not (tmp_path / "out/open_clip_config.json").exists()
