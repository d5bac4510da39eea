import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.method.adapter import attach_adapter, blocks, gate_scores, merge_adapter
from pipeline.model.clip import _quick_gelu, load_clip, save_open_clip
from pipeline.model.towers import adapter_targets
from pipeline.model.weights import stock_state

MakeDir = Callable[..., Path]
Batch = tuple[Tensor, Tensor]


def test_directory_without_weights_starts_from_the_seed(config_dir: MakeDir) -> None:
    """Directory without weights starts from the seed and leaves the global generator."""
    name = f"local-dir:{config_dir()}"
    state = torch.get_rng_state()
    one, same, other = (load_clip(name, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.digest == same.digest != other.digest
    assert one.model.logit_scale.shape == (1,)
    assert all(p.dtype == torch.float32 for p in one.model.parameters())


def test_architecture_name_without_weights_starts_from_the_seed() -> None:
    clip = load_clip("ViT-S-32", seed=1)
    assert clip.model_cfg["vision_cfg"]["width"] == 384
    assert clip.tokenizer(["a dog", "a cat"]).shape == (2, 77)
    assert clip.preprocess_cfg["interpolation"] == "bicubic"


def test_preprocessing_comes_with_the_directory(clip_dir: MakeDir) -> None:
    """Preprocessing activation and tokenizer come with the directory."""
    clip = load_clip(f"local-dir:{clip_dir()}")
    expected = {"size": (16, 16), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "resize_mode": "shortest"}
    assert expected.items() <= clip.preprocess_cfg.items()
    assert clip.model_cfg["quick_gelu"] is True
    assert {type(m).__name__ for m in clip.model.modules()} & {"QuickGELU", "GELU"} == {"QuickGELU"}
    assert clip.tokenizer(["a photo of a dog"]).shape == (1, 8)


def test_half_precision_weights_are_cast_to_fp32(clip_dir: MakeDir, tmp_path: Path) -> None:
    clip = load_clip(f"local-dir:{clip_dir()}")
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "open_clip_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    again = load_clip(f"local-dir:{tmp_path}")
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    weight = again.model.get_parameter("visual.conv1.weight")
    assert torch.equal(weight, stored["visual.conv1.weight"].float())


@pytest.mark.parametrize("architecture", ["flat", "nested", "custom"])
def test_saved_directory_has_the_stock_open_clip_layout(architecture: str, clip_dir: MakeDir, tmp_path: Path) -> None:
    """Saved directory is stock open clip layout with the same digest."""
    source = clip_dir(architecture)
    clip = load_clip(f"local-dir:{source}")
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path)
    ours = load_file(tmp_path / "open_clip_model.safetensors")
    stock = load_file(source / "open_clip_model.safetensors")
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
    assert ours["logit_scale"].shape == ()
    assert load_clip(f"local-dir:{tmp_path}").digest == clip.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_model_loads_in_stock_open_clip(kind: str, clip_dir: MakeDir, batch: Batch, tmp_path: Path) -> None:
    """Merged model loads in stock open clip with equal outputs."""
    clip = load_clip(f"local-dir:{clip_dir()}")
    attach_adapter(adapter_targets(clip.model), rank=2, kind=kind)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for block in blocks(clip.model).values():
            block.lowrank.lora_B.normal_(std=0.2)
        for score in gate_scores(clip.model)[::3]:
            score.fill_(0.0)
    clip.model.eval()
    unmerged = [out.detach() for out in clip.model(*batch)]
    with pytest.raises(ValueError, match="24 blocks are not merged"):
        stock_state(clip.model)

    merge_adapter(clip.model)
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path)
    stock, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    preprocess: Any = transform
    for got, expected in zip(stock.eval()(*batch), unmerged, strict=True):
        torch.testing.assert_close(got, expected.reshape(got.shape), rtol=0, atol=1e-5)
    assert list(preprocess.transforms[-1].mean) == [0.4, 0.5, 0.6]
    assert load_clip(f"local-dir:{tmp_path}").digest != clip.digest


def test_digest_sees_a_single_bit_and_no_order(clip_dir: MakeDir) -> None:
    from pipeline.model.weights import weights_digest

    state = load_file(clip_dir() / "open_clip_model.safetensors")
    digest = weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == digest
    state["visual.proj"].view(torch.int32)[0, 0] ^= 1
    assert weights_digest(state) != digest


def test_a_weight_file_goes_with_a_config_directory(
    clip_dir: MakeDir, config_dir: MakeDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = clip_dir() / "open_clip_model.safetensors"
    expected = load_clip(f"local-dir:{weights.parent}").digest
    torch.save({"state_dict": {f"module.{k}": v for k, v in load_file(weights).items()}}, tmp_path / "epoch_1.pt")
    config = config_dir()
    caplog.clear()
    for pretrained in (weights, weights.parent, tmp_path / "epoch_1.pt"):
        assert load_clip(f"local-dir:{config}", str(pretrained)).digest == expected
    assert "randomly" not in caplog.text
    assert load_clip(f"local-dir:{config}").digest != expected
    assert "randomly" in caplog.text


def test_a_weight_file_goes_with_an_architecture_name(tmp_path: Path) -> None:
    clip = load_clip("ViT-S-32", seed=1)
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path)
    assert load_clip("ViT-S-32", str(tmp_path / "open_clip_model.safetensors"), seed=2).digest == clip.digest
    assert load_clip("ViT-S/32", str(tmp_path), seed=2).digest == clip.digest


def test_a_path_alone_means_local_dir(clip_dir: MakeDir) -> None:
    directory = clip_dir()
    clip = load_clip(str(directory))
    assert clip.name == f"local-dir:{directory}"
    assert clip.digest == load_clip(f"local-dir:{directory}").digest


def test_a_hugging_face_tokenizer_is_saved_with_the_model(clip_dir: MakeDir, tmp_path: Path) -> None:
    text_cfg = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1}
    source = clip_dir("flat", text_cfg=text_cfg | {"hf_tokenizer_name": "some/tokenizer"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer.from_pretrained(tmp_path).save_pretrained(source)
    clip = load_clip(str(source))
    with pytest.raises(ValueError, match="some/tokenizer"):
        save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path / "out")
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path / "out", tokenizer=clip.tokenizer)
    tokens = load_clip(str(tmp_path / "out")).tokenizer(["a dog"])
    assert tokens.tolist() == [[2, 5, 6, 3, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-61", None, "is not an open_clip architecture; near: .*ViT-B-16"),
        ("local-dir:/nowhere", None, "no open_clip_config.json in that directory"),
        ("ViT-S-32", "no_such_tag", "no_such_tag.*not a known tag"),
        ("RN50", None, "image tower is not a plain transformer"),
    ],
)
def test_wrong_names_are_config_errors(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_clip(name, pretrained)


def test_wrong_weight_files_are_config_errors(clip_dir: MakeDir, config_dir: MakeDir, tmp_path: Path) -> None:
    directory = config_dir()
    with pytest.raises(ConfigError, match="must be a weight file; model.pretrained=null takes"):
        load_clip(f"local-dir:{directory}", "openai")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ConfigError, match=r"torn\.safetensors"):
        load_clip(f"local-dir:{directory}", str(tmp_path / "torn.safetensors"))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ConfigError, match=r"text\.pt"):
        load_clip(f"local-dir:{directory}", str(tmp_path / "text.pt"))
    other = clip_dir("flat", embed_dim=24) / "open_clip_model.safetensors"
    with pytest.raises(ConfigError, match="size mismatch"):
        load_clip(f"local-dir:{directory}", str(other))
    typo = config_dir("flat", vision_cfg={"image_size": 16, "layer": 2})
    with pytest.raises(ConfigError, match="unexpected keyword argument 'layer'"):
        load_clip(str(typo))
    (directory / "open_clip_config.json").write_text(json.dumps({"embed_dim": 16}))
    with pytest.raises(ConfigError, match="model_cfg"):
        load_clip(f"local-dir:{directory}")


def test_quick_gelu_weights_force_quick_gelu() -> None:
    """Weights trained with quick gelu force it on a plain architecture."""
    assert _quick_gelu("ViT-B-16", "openai", {"quick_gelu": False}) is True
    assert _quick_gelu("ViT-B-16-quickgelu", "openai", {"quick_gelu": True}) is False
    assert _quick_gelu("ViT-B-16", "laion2b_s34b_b88k", {}) is False
    with pytest.raises(ConfigError, match="without QuickGELU"):
        _quick_gelu("ViT-B-16", "laion2b_s34b_b88k", {"quick_gelu": True})
