"""A run directory becomes the merged model that it trained, or an error with the mismatch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import ConfigError
from pipeline.method.adapter import blocks
from pipeline.model.clip import load_clip
from pipeline.model.restore import find_run, load_base, load_run
from pipeline.model.weights import stock_state, weights_digest

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("kind", "train_rest"),
    [("full", "all"), ("none", "all"), ("none", "proj_ln")]
    + [(kind, rest) for kind in ("lora", "dora") for rest in ("all", "proj_ln", "none")],
)
def test_the_merged_model_computes_what_the_run_computed(
    tmp_path: Path, make_run: Make, kind: str, train_rest: str
) -> None:
    run = make_run(tmp_path / "run", kind=kind, train_rest=train_rest)
    expected = torch.load(run / "expected.pt", weights_only=True)
    model: Any = load_run(run).model
    assert not blocks(model)
    assert not model.training
    with torch.no_grad():
        images = model.encode_image(expected["images"])
        texts = model.encode_text(expected["tokens"])
    torch.testing.assert_close(images, expected["image_features"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(texts, expected["text_features"], atol=1e-5, rtol=1e-5)
    untouched: Any = load_base(find_run(run)).model
    assert (untouched.encode_image(expected["images"]) - images).abs().max() > 1e-3


def test_a_step_can_be_chosen_and_the_newest_is_the_default(tmp_path: Path, make_run: Make) -> None:
    run = make_run(tmp_path / "run", steps=(10, 20))
    assert find_run(run).label == "run/step-00000020"
    assert find_run(run, step=10).checkpoint.name == "step-00000010"
    older, newest = weights_digest(stock_state(load_run(run, 10).model)), load_run(run).model
    assert older != weights_digest(stock_state(newest))
    with pytest.raises(ConfigError, match="no checkpoint step-00000015; there are: step-00000010, step-00000020"):
        find_run(run, step=15)


def test_restored_logit_scale_is_capped(tmp_path: Path, make_run: Make) -> None:
    """Earlier versions saved what the optimizer made of it; evaluation, exports and the served model take exp of it."""
    run = make_run(tmp_path / "run")
    edit(run, lambda saved: saved["logit_scale"].fill_(5.0), "trainable.safetensors")
    assert stock_state(load_run(run).model)["logit_scale"] == torch.tensor(math.log(100.0))


def test_all_gates_closed_and_no_rest_is_the_base_bit_for_bit(tmp_path: Path, make_run: Make) -> None:
    run = make_run(tmp_path / "run", kind="dora", train_rest="none", score=0.05)
    clip = load_run(run)
    assert weights_digest(stock_state(clip.model)) == clip.digest


def edit(run: Path, change: Callable[[dict[str, Any]], None], name: str = "state.json") -> None:
    file = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / name
    if name.endswith(".json"):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    else:
        content = load_file(file)
        change(content)
        save_file(content, file)


FIRST = "visual.transformer.resblocks.0.attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.lowrank.lora_A"), f"missing {FIRST}.lowrank.lora_A"),
        (lambda t: t.pop("positional_embedding"), "missing positional_embedding"),
        (lambda t: t.update(stray=torch.zeros(2)), "unknown stray"),
        (lambda t: t.update({f"{FIRST}.gate.score": torch.zeros(3)}), r"gate.score has shape \(3,\), expected \(1,\)"),
    ],
)
def test_parameters_that_do_not_fit_are_named(
    tmp_path: Path, make_run: Make, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    run = make_run(tmp_path / "run")
    edit(run, change, "trainable.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_run(run)


def test_other_base_weights_are_refused(tmp_path: Path, make_run: Make) -> None:
    run = make_run(tmp_path / "run")
    edit(run, lambda state: state["model"].update(seed=99))
    with pytest.raises(ConfigError, match="was trained on base weights"):
        load_run(run)


def test_an_unknown_target_is_named(tmp_path: Path, make_run: Make) -> None:
    run = make_run(tmp_path / "run")
    edit(run, lambda state: state["adapter"]["targets"].append("image.77.q_proj"))
    with pytest.raises(ConfigError, match=r"image\.77\.q_proj"):
        load_run(run)


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path, make_run: Make) -> None:
    run = make_run(tmp_path / "run")
    file = find_run(run).checkpoint / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"trainable\.safetensors: cannot be read"):
        load_run(run)


def test_what_is_not_a_run_with_a_checkpoint_is_refused(tmp_path: Path, make_run: Make) -> None:
    """A run without checkpoint and a directory that is not a run are refused."""
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        load_run(run)
    with pytest.raises(ConfigError, match="is not a run directory"):
        load_run(tmp_path)


def test_digest_of_the_split_model_is_that_of_the_loaded_one(tiny_clip_dir: Path) -> None:
    clip = load_clip(f"local-dir:{tiny_clip_dir}", seed=4)
    assert weights_digest(stock_state(clip.model)) == clip.digest
