"""A run at a strength: exports and the registered model against weights that are mixed here by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import CLIPModel

from pipeline.cli import main
from pipeline.config import ConfigError, Promote, load_config, override, to_yaml
from pipeline.handoff.export import export
from pipeline.handoff.predict import predict_files
from pipeline.handoff.promote import promote
from pipeline.model.restore import find_run, load_base, load_run
from pipeline.tracking.mlflow.registry import Registry


def by_hand(run: Path, alpha: float) -> Any:
    """W0 + α (W1 − W0) over everything that two plain models hold."""
    tuned, base = load_run(run), load_base(find_run(run))
    start, end = base.model.state_dict(), tuned.model.state_dict()
    mixed = {name: start[name].double() + alpha * (end[name].double() - start[name].double()) for name in start}
    tuned.model.load_state_dict({name: value.to(end[name].dtype) for name, value in mixed.items()})
    return tuned


@torch.no_grad()
def by_transformers(model: Any, batch: Any) -> Tensor:
    return model.eval()(input_ids=batch.tokens, pixel_values=batch.images).logits_per_image


@torch.no_grad()
def by_open_clip(directory: Path, batch: Any) -> Tensor:
    model: Any = open_clip.create_model(f"local-dir:{directory}", require_pretrained=True).eval()
    return model.get_logits(batch.images, batch.tokens)[0]


def by_peft(directory: Path, batch: Any) -> Tensor:
    base = CLIPModel.from_pretrained(directory / "base")
    return by_transformers(PeftModel.from_pretrained(base, str(directory)), batch)


def in_cosines(one: Tensor, other: Tensor, clip: Any) -> float:
    """The largest difference of a logit without the scale, by which rounding is multiplied."""
    return float((one - other).abs().max() / clip.model.logit_scale.exp())


@pytest.mark.parametrize("rest", ["none", "all"])
@pytest.mark.parametrize("pruned", [False, True], ids=["open", "pruned"])
def test_three_libraries_read_half_of_the_fine_tuning(
    pruned: bool, rest: str, make_run: Callable[..., Path], batch: Any, tmp_path: Path
) -> None:
    run = make_run("lora", pruned, rest)
    half = by_hand(run, 0.5)
    wanted = batch.logits(half)
    assert in_cosines(wanted, batch.logits(load_run(run)), half) > 0.01
    for to in ("open_clip", "hf", "peft"):
        export(run, to, tmp_path / to, verify=False, strength=0.5)
    found = {
        "open_clip": by_open_clip(tmp_path / "open_clip", batch),
        "transformers": by_transformers(CLIPModel.from_pretrained(tmp_path / "hf"), batch),
        "peft": by_peft(tmp_path / "peft", batch),
    }
    assert {name: in_cosines(logits, wanted, half) < 1e-5 for name, logits in found.items()} == dict.fromkeys(
        found, True
    )
    assert json.loads((tmp_path / "hf" / "selora.json").read_text())["strength"] == "0.5"
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 3  # half of 6


def test_dora_has_no_adapter_at_a_strength_but_merged_weights(
    make_run: Callable[..., Path], batch: Any, tmp_path: Path
) -> None:
    run = make_run("dora", True)
    with pytest.raises(ConfigError, match=r"strength=0\.3: a DoRA adapter has no scale factor, .* \(--to hf\)"):
        export(run, "peft", tmp_path / "peft", strength=0.3)
    assert not (tmp_path / "peft").exists()
    report = export(run, "open_clip", tmp_path / "clip", strength=0.3)
    assert report.difference is not None
    mixed = by_hand(run, 0.3)
    assert in_cosines(by_open_clip(tmp_path / "clip", batch), batch.logits(mixed), mixed) < 1e-5


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Path], benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose config says what it is evaluated on."""
    made = make_run("lora", True, directory=tmp_path_factory.mktemp("strength") / "run", seed=3)
    config = override(load_config(made / "config.yaml"), {"eval.benchmark": str(benchmark), "eval.workers": 0})
    (made / "config.yaml").write_text(to_yaml(config))
    return made


def test_a_promoted_model_answers_with_the_weights_in_between(
    run: Path, store: str, photo: bytes, tmp_path: Path, pixels_of: Callable[..., Any]
) -> None:
    done = promote(run, "between", Promote(min_id=0.0), champion=True, uri=store, strength=0.5)
    assert done.version == "1"
    tags = Registry(store, "between").tags("1")
    assert tags["selora.strength"] == "0.5" and "selora.floor" not in tags
    results = json.loads((run / "eval" / "strength" / "0.5" / "summary.json").read_text())
    assert results["model_digest"] == tags["selora.weights_digest"]
    (tmp_path / "photo.png").write_bytes(photo)
    (row,) = predict_files("models:/between@champion", [tmp_path / "photo.png"], uri=store, top_k=10)
    wanted = scores(by_hand(run, 0.5), run, photo, row["labels"], pixels_of)
    assert row["scores"] == pytest.approx(wanted, abs=1e-5)
    assert row["scores"] != pytest.approx(scores(load_run(run), run, photo, row["labels"], pixels_of), abs=1e-2)


@torch.no_grad()
def scores(clip: Any, run: Path, photo: bytes, names: list[str], pixels_of: Callable[..., Any]) -> list[float]:
    """softmax over classes of scale times cosine, with the mean of a class's captions."""
    templates = load_config(run / "config.yaml").data.templates
    image = torch.nn.functional.normalize(clip.model.encode_image(pixels_of(photo, clip)), dim=-1)
    heads = []
    for name in names:
        texts = clip.model.encode_text(clip.tokenizer([each.replace("{c}", name) for each in templates]))
        heads.append(torch.nn.functional.normalize(torch.nn.functional.normalize(texts, dim=-1).mean(0), dim=-1))
    return (clip.model.logit_scale.exp() * image @ torch.stack(heads).T).softmax(-1)[0].tolist()


def test_auto_is_promoted_with_its_floor_or_not_at_all(
    run: Path, store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["promote", str(run), "--name", "auto", "--uri", store, "--strength", "auto"]
    assert main([*arguments, "--rule", "max_forgetting=null", "min_kept=null"]) == 2
    assert "give promote.min_kept (share kept" in capsys.readouterr().err
    rule = ["--rule", "min_kept=0.0", "min_gain=null", "max_forgetting=null"]
    assert main([*arguments, *rule]) == 0
    message = capsys.readouterr().out
    assert "strength auto: α = 1 keeps promote.min_kept >= 0" in message
    tags = Registry(store, "auto").tags("1")
    assert tags["selora.floor"] == "promote.min_kept >= 0" and len(tags["selora.choosing_digest"]) == 64
    monkeypatch.setattr("pipeline.evaluation.auto_strength.strongest", lambda margin, untouched: (0.0, {0.05: -0.2}))
    assert main([*arguments, *rule]) == 1
    message = capsys.readouterr().out
    assert "α = 0, the untouched model: no strength above 0 keeps promote.min_kept" in message
    assert message.rstrip().endswith("is not promoted")
    export_it = ["export", str(run), "--to", "hf", "--strength", "auto", "--floor", "0.9"]
    assert main([*export_it[:2], str(run.parent / "out"), *export_it[2:]]) == 2
    assert "nothing is exported" in capsys.readouterr().err
