"""The environment of all tests, set before torch or mlflow is imported, and fixtures that several packages share."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["requirements", "tiny_benchmark"]

# Two threads per process times several ranks on two cores is slower than one, and changes the order of sums.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _inherited in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MLFLOW_TRACKING_URI"):
    os.environ.pop(_inherited, None)

# What a test decodes does not belong in the user's cache; all processes of a session share one.
_own_cache = "SELORA_CACHE" not in os.environ
if _own_cache:
    os.environ["SELORA_CACHE"] = tempfile.mkdtemp(prefix="selora-cache-")

REPOSITORY = Path(__file__).parent.parent
TINY = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
# The expression of `pytest -m` that runs the tests on a card, and nothing else.
GPU_ONLY = "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Hide the cards from all tests but those marked gpu, so that a machine with cards runs what every other one does.

    Two ranks of a test would otherwise ask for one card.
    """
    if config.option.markexpr != GPU_ONLY:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_unconfigure() -> None:
    """Remove the session's cache, by the process that made it."""
    if _own_cache:
        shutil.rmtree(os.environ["SELORA_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a card, with the reason, where there is none or where it is hidden."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = f"cards are hidden; `pytest -m {GPU_ONLY}` shows them"
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        import torch

        reason = "" if torch.cuda.is_available() else "needs a CUDA device"
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """make(size) -> a file system of its own, as in "128k"; skips where none can be mounted."""
    from requirements import lacking

    folder = tmp_path / "small"

    def make(size: str) -> Path:
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            lacking("tmpfs", mounted.stderr.decode().strip())
        return folder

    yield make
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(classes=3, each=8, size=32, seed=0) -> an ImageFolder of seeded noise over one colour per class, JPEG."""

    def make(classes: int = 3, each: int = 8, size: int = 32, seed: int = 0) -> Path:
        import numpy as np
        from PIL import Image

        root = tmp_path_factory.mktemp("images")
        draw = np.random.default_rng(seed)
        for label in range(classes):
            folder = root / f"class_{label}"
            folder.mkdir()
            colour = draw.integers(0, 256, 3)
            for index in range(each):
                pixels = np.clip(colour + draw.normal(0, 24, (size, size, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{index:03d}.jpg")
        return root

    return make


@pytest.fixture(scope="session")
def fork_server() -> Any:
    """A multiprocessing context whose processes have imported what training needs, which takes seconds of CPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.training.run", "deepspeed", "open_clip", "webdataset"])
    return context


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that open_clip loads by local-dir:, with random weights in it."""
    from pipeline.model.clip import load_clip, save_open_clip

    folder = tmp_path_factory.mktemp("tiny_clip")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY))
    clip = load_clip(f"local-dir:{folder}", seed=3)
    return save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, folder)


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(**model_args) -> a tiny ViT as timm's own `save_for_hf` writes it, with random weights, for 32 x 32."""

    def make(**changes: Any) -> Path:
        import timm
        import torch
        from timm.models import save_for_hf

        args: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2} | changes
        directory = tmp_path_factory.mktemp("vit")
        torch.manual_seed(3)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save_for_hf(model, str(directory), model_config={"model_args": args}, safe_serialization=True)
        config = json.loads((directory / "config.json").read_text())
        config["pretrained_cfg"] |= {"input_size": [3, 32, 32], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[[Path], None]:
    """save(directory) -> a tokenizer of single words there, as transformers writes one."""

    def save(directory: Path) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        text = "a the of photo picture class_0 class_1 class_2 class_3 cat dog red"
        words = ["<pad>", "</s>", "<unk>", *text.split()]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        names = {"pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(str(directory))

    return save


@pytest.fixture(scope="session")
def trunk_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(architecture, **model_args) -> a directory that timm builds by local-dir:, without weights, for 32 x 32."""

    def make(architecture: str = "vit_base_patch16_siglip_224", **changes: Any) -> Path:
        args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2} | changes
        args = {key: value for key, value in args.items() if value is not None}
        directory = tmp_path_factory.mktemp("trunk")
        size = {"input_size": [3, args["img_size"], args["img_size"]]} if "img_size" in args else {}
        config = {"architecture": architecture, "model_args": args, "pretrained_cfg": size}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture(scope="session")
def siglip_dir(
    tmp_path_factory: pytest.TempPathFactory,
    trunk_dir: Callable[..., Path],
    word_tokenizer: Callable[[Path], None],
) -> Path:
    """A tiny SigLIP 2 as stock open_clip builds it, with its tokenizer; every weight moved away from its start."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("siglip")
    vision = {"image_size": 32, "timm_model_name": f"local-dir:{trunk_dir()}", "timm_pool": "map", "timm_proj": "none"}
    text = {
        "context_length": 8,
        "vocab_size": 20,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "hf_tokenizer_name": "words",
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }
    model_cfg = {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    word_tokenizer(directory)
    torch.manual_seed(1)
    model = open_clip.create_model(f"local-dir:{directory}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if name == "logit_scale":
                parameter.fill_(4.77)  # that of the published models, above CLIP's bound of ln 100
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return directory


@pytest.fixture(scope="session")
def make_vit_run(vit_dir: Callable[..., Path]) -> Callable[..., Path]:
    """make(run, classes, steps=(5, 10, 15, 20)) -> gated LoRA over a tiny ViT, as `selora train` leaves it.

    From one kept step to the next the parameters are moved at random; with the third all gates are closed.
    """

    def make(run: Path, classes: tuple[str, ...], steps: tuple[int, ...] = (5, 10, 15, 20)) -> Path:
        import torch

        from pipeline.config import Config, override, to_yaml
        from pipeline.training.checkpoint import save_checkpoint
        from pipeline.training.cluster.distributed import read_world
        from pipeline.training.model import attach_blocks, checkpoint_state, load_untouched, trainable

        changes = {
            "name": run.name,
            "out": str(run.parent),
            "model.name": f"timm:local-dir:{vit_dir(depth=2)}",
            "adapter.rank": 4,
            "train.train_rest": "none",
            "tracking.enabled": False,
        }
        config = override(Config.model_validate({"data": {"train": "shards"}}), changes)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config))
        model = attach_blocks(config, load_untouched(config, classes))
        parameters = dict(trainable(model.model))
        generator = torch.Generator().manual_seed(3)
        for step in steps:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    moved = 0.2 * torch.randn(parameter.shape, generator=generator)
                    parameter.add_(-0.02 if name.endswith("gate.score") else moved)
            state = checkpoint_state(config, model, "0" * 64, step, read_world({}))
            saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            save_checkpoint(run, saved, {"moment": torch.zeros(1)}, state, keep_last=9)
        return run

    return make
