"""Bases of other layouts, sizes and file formats: the same weights as loaded by stock open_clip and transformers."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.model.clip import load_clip, save_open_clip
from pipeline.model.export import clip_logits, fixed_batch, write_hf
from pipeline.model.vit import load_vit, save_timm
from pipeline.model.weights import stock_state

MakeDir = Callable[..., Path]


@pytest.fixture(scope="module")
def plain_dir(clip_dir: MakeDir) -> Path:
    """A CLIP that transformers can have as well: CLIP's own vocabulary, no option of its own."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return clip_dir("flat", text_cfg=text)


@pytest.fixture(scope="module")
def transformers_dir(plain_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    write_hf(load_clip(str(plain_dir)), directory)
    return directory


def stock_logits(directory: Path, batch: tuple[Tensor, ...], **options: Any) -> Tensor:
    model: Any = open_clip.create_model(f"local-dir:{directory}", require_pretrained=True, **options)
    return clip_logits(model.eval(), *batch)


def test_a_directory_of_transformers_is_the_same_base(plain_dir: Path, transformers_dir: Path) -> None:
    from transformers import CLIPModel

    ours, theirs = load_clip(str(plain_dir)), load_clip(f"local-dir:{transformers_dir}")
    assert theirs.digest == ours.digest
    assert all(torch.equal(t, stock_state(ours.model)[name]) for name, t in stock_state(theirs.model).items())
    assert json.loads(json.dumps(theirs.preprocess_cfg)) == json.loads(json.dumps(ours.preprocess_cfg))
    batch = fixed_batch(theirs)
    assert torch.equal(batch[1], fixed_batch(ours)[1])
    logits = clip_logits(theirs.model.eval(), *batch)
    torch.testing.assert_close(stock_logits(plain_dir, batch), logits, rtol=1e-5, atol=1e-4)
    model: Any = CLIPModel.from_pretrained(transformers_dir).eval()
    with torch.no_grad():
        stock = model(pixel_values=batch[0], input_ids=batch[1]).logits_per_image
    torch.testing.assert_close(stock, logits, rtol=1e-5, atol=1e-4)


def test_what_is_saved_of_such_a_base_is_read_by_both(transformers_dir: Path, tmp_path: Path) -> None:
    clip = load_clip(str(transformers_dir))
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path / "own")
    write_hf(clip, tmp_path / "hf")
    assert load_clip(str(tmp_path / "own")).digest == load_clip(str(tmp_path / "hf")).digest == clip.digest
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads((transformers_dir / name).read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vision_config"].update(hidden_act="relu"), "open_clip's CLIP has no hidden_act=quick_gelu, relu"),
        (lambda c: c["text_config"].update(layer_norm_eps=1e-6), "no text_config.layer_norm_eps=1e-06"),
        (lambda c: c["vision_config"].update(num_hidden_layers=1), "do not fit its config.json: unknown vision_model"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "missing text_model.encoder.layers.2"),
        (lambda c: c.update(model_type="siglip"), "and no transformers' CLIP"),
    ],
)
def test_what_open_clip_has_no_place_for_is_refused(
    change: Any, message: str, transformers_dir: Path, tmp_path: Path
) -> None:
    for file in transformers_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_clip(f"local-dir:{tmp_path}")


def test_another_vocabulary_and_missing_weights_are_refused(transformers_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(transformers_dir / "config.json")
    with pytest.raises(ConfigError, match="no model.safetensors; load it with transformers"):
        load_clip(str(tmp_path))
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ConfigError, match="its vocabulary is not that of CLIP"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_are_resized_as_by_stock_open_clip(dtype: torch.dtype, plain_dir: Path, tmp_path: Path) -> None:
    """In fp32, also for half weights, which torch cannot resize on a CPU."""
    weights = load_file(plain_dir / "open_clip_model.safetensors")
    half, single = tmp_path / "half", tmp_path / "single"
    for directory, kind in ((half, dtype), (single, torch.float32)):
        directory.mkdir()
        (directory / "open_clip_config.json").symlink_to(plain_dir / "open_clip_config.json")
        state = {name: t.to(dtype).to(kind) for name, t in weights.items()}
        save_file(state, directory / "open_clip_model.safetensors")
    clip = load_clip(str(half), image_size=24)
    assert clip.image_size == clip.model_cfg["vision_cfg"]["image_size"] == 24
    assert clip.preprocess_cfg["size"] == (24, 24)
    batch = fixed_batch(clip)
    assert batch[0].shape[-2:] == (24, 24)
    logits = clip_logits(clip.model.eval(), *batch)
    torch.testing.assert_close(stock_logits(single, batch, force_image_size=24), logits, rtol=1e-5, atol=1e-4)
    assert len({load_clip(str(half), image_size=size).digest for size in (None, 16, 24, 32)}) == 3
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path / "out")
    torch.testing.assert_close(stock_logits(tmp_path / "out", batch), logits, rtol=1e-5, atol=1e-4)


def test_a_vit_is_resized_as_by_stock_timm(vit_dir: Callable[..., Path], tmp_path: Path) -> None:
    import timm

    directory = vit_dir()
    vit = load_vit(f"timm:local-dir:{directory}", image_size=48, classes=("a", "b"))
    assert (vit.image_size, vit.preprocess_cfg["size"]) == (48, (48, 48))
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    stock: Any = timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=0, img_size=48)
    with torch.no_grad():
        torch.testing.assert_close(vit.model.eval().encode_image(images), stock.eval()(images), rtol=1e-5, atol=1e-5)
        save_timm(vit, tmp_path / "out")
        again: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(again(images), vit.model(images), rtol=1e-5, atol=1e-5)
    assert load_vit(f"timm:local-dir:{tmp_path / 'out'}").preprocess_cfg["size"] == (48, 48)
    own, same = (load_vit(f"timm:local-dir:{directory}", image_size=size) for size in (None, 32))
    assert own.digest == same.digest != vit.digest


def test_sizes_that_cannot_be_are_refused(plain_dir: Path, siglip_dir: Path) -> None:
    with pytest.raises(ConfigError, match="image_size=20: should be a multiple of the patch size, 8"):
        load_clip(str(plain_dir), image_size=20)
    with pytest.raises(ConfigError, match="builds the VisionTransformer of this model at one size"):
        load_clip(str(siglip_dir), image_size=64)


def test_the_command_for_unsafe_weight_files_makes_them_readable(plain_dir: Path, tmp_path: Path) -> None:
    """open_clip's own epoch_N.pt needs none; TorchScript and pickled files are refused with the line to run."""
    name, weights = str(plain_dir), load_file(plain_dir / "open_clip_model.safetensors")
    wanted = load_clip(name).digest
    state = {f"module.{n}": t for n, t in weights.items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, tmp_path / "epoch_3.pt")
    assert load_clip(name, str(tmp_path / "epoch_3.pt")).digest == wanted
    model: Any = open_clip.create_model(f"local-dir:{plain_dir}", require_pretrained=True)
    torch.save(model, tmp_path / "whole.pt")
    batch = fixed_batch(load_clip(name))
    traced: Any = torch.jit.trace(model.eval(), batch, check_trace=False)
    traced.save(str(tmp_path / "script.pt"))
    for file, what in (("whole.pt", "pickled with more than tensors"), ("script.pt", "a TorchScript archive")):
        with pytest.raises(ConfigError, match=what) as error:
            load_clip(name, str(tmp_path / file))
        assert "weights_only" not in str(error.value).replace("weights_only=False); ", "")
        line = next(line for line in str(error.value).splitlines() if line.startswith("python -c"))
        program, flag, code = shlex.split(line)
        assert (program, flag) == ("python", "-c")
        exec(code, {})
        assert load_clip(name, str((tmp_path / file).with_suffix(".safetensors"))).digest == wanted


def test_paths_are_absolute_wherever_the_command_was_given(
    plain_dir: Path, vit_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_dir.parent)
    for name in (plain_dir.name, f"local-dir:{plain_dir.name}"):
        clip = load_clip(name, os.path.join(plain_dir.name, "open_clip_model.safetensors"))
        assert clip.name == f"local-dir:{plain_dir}"
        assert clip.pretrained == str(plain_dir / "open_clip_model.safetensors")
    vit = vit_dir()
    monkeypatch.chdir(vit.parent)
    assert load_vit(f"timm:local-dir:{vit.name}").name == f"timm:local-dir:{vit}"


@pytest.mark.parametrize("kind", ["own", "transformers", "siglip"])
def test_a_hollow_model_differs_in_its_values_alone(
    kind: str, plain_dir: Path, transformers_dir: Path, siglip_dir: Path
) -> None:
    name = str({"own": plain_dir, "transformers": transformers_dir, "siglip": siglip_dir}[kind])
    full, hollow = load_clip(name), load_clip(name, hollow=True)
    assert (hollow.digest, hollow.model_cfg, hollow.name) == ("", full.model_cfg, full.name)
    wanted = {key: (t.shape, t.dtype, t.device) for key, t in full.model.state_dict().items()}
    assert {key: (t.shape, t.dtype, t.device) for key, t in hollow.model.state_dict().items()} == wanted
    assert all(torch.equal(t, dict(full.model.named_buffers())[key]) for key, t in hollow.model.named_buffers())
    hollow.model.load_state_dict(full.model.state_dict())
    batch = fixed_batch(full)
    ours, theirs = (clip_logits(clip.model.eval(), *batch) for clip in (full, hollow))
    assert torch.equal(ours, theirs)
