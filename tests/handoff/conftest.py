"""Runs on the demo's CLIP whose parameters are moved at random, as fine-tuning would, in a second each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import Config, load_config, to_yaml
from pipeline.data.eval.batches import eval_loader
from pipeline.data.eval.wds_layout import open_eval_set, pack_eval
from pipeline.data.images import decode, eval_resize, normalize
from pipeline.data.shards.index import load_index
from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.run import evaluate_run
from pipeline.method.adapter import blocks
from pipeline.model.clip import Clip
from pipeline.model.load import Model, as_clip
from pipeline.model.restore import load_run
from pipeline.runs.sweep import write_sweep
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.cluster.distributed import read_world
from pipeline.training.model import attach_blocks, checkpoint_state, load_untouched, trainable


@dataclass(frozen=True)
class Batch:
    """The demo's test images and the tokens of its classes, and the logits that a run's merged model gives them."""

    images: Tensor
    tokens: Tensor

    def logits(self, clip: Clip) -> Tensor:
        with torch.no_grad():
            model: Any = clip.model.eval()
            image = torch.nn.functional.normalize(model.encode_image(self.images), dim=-1)
            text = torch.nn.functional.normalize(model.encode_text(self.tokens), dim=-1)
            return model.get_parameter("logit_scale").exp() * image @ text.T


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("demo_data"), "clothing_train.tar.gz", "eval.tar.gz")


@pytest.fixture(scope="session")
def batch(data: Path, make_run: Callable[..., Path]) -> Batch:
    """Twelve test photos of clothes, transformed, and the ten class names."""
    clip = as_clip(load_run(make_run()), "the batch")
    photos = open_eval_set(data / "eval" / "clothing")
    pixels = next(iter(eval_loader(photos, clip.preprocess_cfg, batch_size=12, workers=0))).images
    images = normalize(pixels, clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"])
    return Batch(images, clip.tokenizer([f"a photo of a {name}." for name in photos.classnames or ()]))


def _config(out: Path, name: str, data: Path, changes: list[str]) -> Config:
    settings = [
        f"name={name}",
        f"out={out}",
        f"model.name=local-dir:{asset(MODEL)}",
        f"data.train={data / 'clothing_train'}",
        "adapter.rank=4",
        "adapter.alpha=6",
        "tracking.enabled=false",
    ]
    return load_config(asset(FINETUNE), settings + changes)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[..., Path]:
    """make(kind="lora", pruned=False, train_rest="none", directory=None, seed=5, changes=()) -> a run directory.

    pruned: every third gate is open, the others are closed. Runs without a directory are shared by the session.
    """
    made: dict[tuple[str, bool, str], Path] = {}

    def make(
        kind: str = "lora",
        pruned: bool = False,
        train_rest: str = "none",
        directory: Path | None = None,
        seed: int = 5,
        changes: tuple[str, ...] = (),
    ) -> Path:
        key = (kind, pruned, train_rest)
        if directory is None and key in made:
            return made[key]
        run = directory or tmp_path_factory.mktemp("runs") / f"{kind}{'_pruned' * pruned}"
        settings = [f"adapter.kind={kind}", f"train.train_rest={train_rest}", *changes]
        config = _config(run.parent, run.name, data, settings)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config))
        _save(run, config, pruned, seed, data)
        if directory is None:
            made[key] = run
        return run

    return make


def _save(run: Path, config: Config, pruned: bool, seed: int, data: Path) -> None:
    clip = attach_blocks(config, load_untouched(config))
    parameters = dict(trainable(clip.model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not name.endswith("gate.score"):
                scale = 0.3 if "lora_" in name else 0.1 if name.endswith("magnitude") else 0.01
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        for number, block in enumerate(blocks(clip.model).values()):
            if pruned and block.gate is not None:
                block.gate.score.fill_(0.15 if number % 3 == 0 else 0.01)
    state = checkpoint_state(config, clip, load_index(data / "clothing_train").digest, 20, read_world({}))
    tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    save_checkpoint(run, tensors, {"moment": torch.zeros(1)}, state, keep_last=9)


@pytest.fixture(scope="session")
def benchmark(image_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of one id and one zero-shot set, of 12 images each; on the second the untouched CLIP beats chance."""
    root = tmp_path_factory.mktemp("benchmark")
    for seed, name in ((0, "ours"), (11, "others")):
        pack_eval(image_folder(classes=3, each=4, seed=seed), root / name, templates="simple", workers=1)
    rows = "  - {key: ours, group: id, path: ours}\n  - {key: others, group: zero-shot, path: others}\n"
    (root / "benchmark.yaml").write_text(f"name: tiny\ndatasets:\n{rows}")
    return root / "benchmark.yaml"


@pytest.fixture(scope="session")
def evaluated(benchmark: Path) -> Callable[[Path], Path]:
    """evaluate(run) -> the same run with results of its newest checkpoint."""

    def evaluate(run: Path) -> Path:
        settings = Settings(batch_size=12, workers=0)
        evaluate_run(run, load_benchmark(benchmark), run / "eval", settings, baselines=run.parent / "baselines")
        return run

    return evaluate


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"


@pytest.fixture(scope="session")
def photo(data: Path) -> bytes:
    """A PNG of the first of the demo's test photos."""
    import io
    import tarfile

    from PIL import Image

    with tarfile.open(next((data / "eval" / "clothing").rglob("*.tar"))) as tar:
        member = next(one for one in tar.getmembers() if one.name.endswith(("webp", "jpg", "png")))
        stored = tar.extractfile(member)
        assert stored is not None
        image = decode(stored.read(), form="reference")
    out = io.BytesIO()
    assert isinstance(image, Image.Image)
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="session")
def pixels_of() -> Callable[[bytes, Model], Tensor]:
    """pixels(file, model) -> (1, 3, H, W) as the evaluation transforms it."""

    def pixels(file: bytes, model: Model) -> Tensor:
        resized = eval_resize(decode(file, form="reference"), model.preprocess_cfg)
        return normalize(resized[None], model.preprocess_cfg["mean"], model.preprocess_cfg["std"])

    return pixels


@pytest.fixture(scope="session")
def write_sweep_of() -> Callable[..., None]:
    """write(sweep_dir, *names, floor=None): a sweep.json with trials of these names."""

    def write(sweep_dir: Path, *names: str, floor: float | None = None) -> None:
        base = Config.model_validate({"name": sweep_dir.name, "data": {"train": "unset"}})
        entry = {"id": "0000-0", "label": "", "changes": {}, "baseline": False}
        write_sweep(sweep_dir, base, {}, [entry | {"name": name} for name in names], floor)

    return write
