"""A tiny random CLIP and small data sets in the clip-benchmark/wds_* layout, made from seeded noise."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from pipeline.model.load import as_clip

if TYPE_CHECKING:
    import torch

    from pipeline.model.clip import Clip

CLASSNAMES = ("apple", "bear", "cup", "door", "eagle", "fig", "goat", "hat", "ink", "jar", "kite", "leaf")
TEMPLATES = ("a photo of a {c}.", "the {c}", "{c} in a drawing")


def picture(seed: int, hue: int, extension: str) -> bytes:
    """A smooth colour gradient with noise, not square, so that resize and crop both matter."""
    draw = np.random.default_rng([seed, hue])
    height, width = int(draw.integers(36, 60)), int(draw.integers(36, 60))
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    colours = np.random.default_rng(hue).integers(0, 256, (3, 3))
    pixels = colours[0] * (1 - rows) + colours[1] * rows * columns + colours[2] * rows * (1 - columns)
    pixels = np.clip(pixels + draw.normal(0, 30, pixels.shape), 0, 255).astype("uint8")
    out = io.BytesIO()
    options = {"jpg": {"format": "JPEG", "quality": 90}, "png": {"format": "PNG"}}.get(
        extension, {"format": "WEBP", "lossless": True}
    )
    Image.fromarray(pixels).save(out, **options)
    return out.getvalue()


def write_wds(
    root: Path, samples: Sequence[dict[str, bytes]], shards: int, texts: dict[str, str], split: str = "test"
) -> Path:
    """A wds_* directory; each sample maps extension -> bytes."""
    folder = root / split
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
    (folder / "nshards.txt").write_text(f"{shards}\n")
    parts = np.array_split(np.arange(len(samples)), shards)
    for shard, indices in enumerate(parts):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in indices:
                for extension, data in samples[i].items():
                    member = tarfile.TarInfo(f"s{i:07d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def write_classification(
    root: Path,
    *,
    n: int = 57,
    classnames: Sequence[str] = CLASSNAMES,
    templates: Sequence[str] = TEMPLATES,
    shards: int = 2,
    seed: int = 0,
    split: str = "test",
) -> Path:
    """n images in all three formats, classes drawn unevenly; one class may well have none."""
    labels = np.random.default_rng(seed).integers(0, len(classnames), n)
    samples = []
    for i, label in enumerate(labels):
        extension = ("webp", "png", "jpg")[i % 3]
        samples.append({extension: picture(seed * 1000 + i, int(label), extension), "cls": str(label).encode()})
    texts = {
        "classnames.txt": "\n".join(classnames),
        "zeroshot_classification_templates.txt": "\n".join(templates),
    }
    return write_wds(root, samples, shards, texts, split)


def write_retrieval(root: Path, *, n: int = 31, seed: int = 7, shards: int = 2) -> Path:
    """n images with one to six captions each."""
    draw = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        words = [draw.choice(CLASSNAMES, size=int(draw.integers(2, 6))) for _ in range(int(draw.integers(1, 7)))]
        captions = "\n".join(f"{' '.join(each)} number {i}" for each in words)
        samples.append({"jpg": picture(seed * 1000 + i, i, "jpg"), "txt": captions.encode()})
    return write_wds(root, samples, shards, {"dataset_type.txt": "retrieval"})


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `local-dir:` model of 2 + 2 layers without weights: load_clip draws them from its seed."""
    root = tmp_path_factory.mktemp("tiny_clip")
    config = {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
            "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"},
    }
    (root / "open_clip_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wds_id, wds_shift (other images), wds_few (3 classes) and wds_pairs (retrieval) below one root."""
    root = tmp_path_factory.mktemp("datasets")
    write_classification(root / "wds_id", seed=1)
    write_classification(root / "wds_shift", n=34, seed=2, shards=3)
    write_classification(root / "wds_few", n=20, classnames=CLASSNAMES[:3], seed=3, shards=1)
    write_retrieval(root / "wds_pairs")
    return root


@pytest.fixture(scope="session")
def trained_clip_dir(tiny_clip_dir: Path, datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a few steps on half of the evaluation images, as a `local-dir:` with weights.

    A random CLIP says the same class for every image, so numbers of it would agree whatever the code did.
    """
    import torch

    from pipeline.data.eval.batches import eval_loader
    from pipeline.data.eval.wds_layout import open_eval_set
    from pipeline.data.images import normalize
    from pipeline.model.clip import load_clip, save_open_clip

    clip = load_clip(f"local-dir:{tiny_clip_dir}", seed=11)
    batches = []
    for folder in ("wds_id", "wds_few", "wds_pairs"):
        data = open_eval_set(datasets / folder)
        for batch in eval_loader(data, clip.preprocess_cfg, batch_size=16, workers=0, limit=len(data) // 2):
            names = [f"a photo of a {CLASSNAMES[label]}." for label in batch.labels.tolist()]
            pixels = normalize(batch.images, clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"])
            batches.append((pixels, clip.tokenizer(names or [captions[0] for captions in batch.captions])))
    clip.model.get_parameter("token_embedding.weight").requires_grad_(False)  # 3 of its 3.3 million parameters
    optimizer = torch.optim.Adam([p for p in clip.model.parameters() if p.requires_grad], lr=3e-3)
    model: Any = clip.model
    for step in range(20):
        pixels, tokens = batches[step % len(batches)]
        images = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1)
        texts = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
        same = (tokens[:, None] == tokens[None]).all(dim=-1).float()
        loss = torch.nn.functional.cross_entropy(10 * images @ texts.T, same / same.sum(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path_factory.mktemp("trained_clip"))


@pytest.fixture(scope="session")
def benchmark_file(datasets: Path) -> Path:
    """All four sets as a benchmark."""
    file = datasets / "benchmark.yaml"
    file.write_text(
        "name: tiny\n"
        "datasets:\n"
        "  - {key: ours, group: id, path: wds_id}\n"
        "  - {key: moved, group: shift, path: wds_shift}\n"
        "  - {key: few, group: zero-shot, path: wds_few}\n"
        "  - {key: pairs, group: retrieval, path: wds_pairs}\n"
    )
    return file


@pytest.fixture(scope="session")
def known_set(datasets: Path) -> Path:
    """wds_known: 45 images to ask about and a bank of 70, for K-NN."""
    write_classification(datasets / "wds_known", n=45, seed=4)
    return write_classification(datasets / "wds_known", n=70, seed=5, shards=3, split="train")


@pytest.fixture(scope="session", name="write_wds")
def write_wds_fixture() -> Callable[..., Path]:
    return write_wds


@pytest.fixture(scope="session")
def make_classification() -> Callable[..., Path]:
    return write_classification


@pytest.fixture(scope="session")
def make_retrieval() -> Callable[..., Path]:
    return write_retrieval


@pytest.fixture(scope="session")
def make_run(tiny_clip_dir: Path, benchmark_file: Path) -> Callable[..., Path]:
    """make_run(directory, kind=, train_rest=, steps=, score=, model=) -> a run directory as `selora train` leaves it.

    Its parameters are moved at random; expected.pt holds inputs and what the unmerged model makes of them.
    """
    import torch

    from pipeline.config import Config, override, to_yaml
    from pipeline.training.checkpoint import save_checkpoint
    from pipeline.training.cluster.distributed import read_world
    from pipeline.training.model import attach_blocks, checkpoint_state, load_untouched, trainable

    def make(
        directory: Path,
        kind: str = "lora",
        train_rest: str = "all",
        steps: Sequence[int] = (20,),
        score: float | None = None,
        model: Path = tiny_clip_dir,
    ) -> Path:
        config = override(
            Config.model_validate({"data": {"train": "shards"}}),
            {
                "name": directory.name,
                "out": str(directory.parent),
                "model.name": f"local-dir:{model}",
                "adapter.kind": kind,
                "adapter.rank": 4,
                "train.train_rest": train_rest,
                "eval.benchmark": str(benchmark_file),
                "eval.workers": 0,
                "tracking.enabled": False,
            },
        )
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(to_yaml(config))
        clip = as_clip(attach_blocks(config, load_untouched(config)), "a run")
        parameters = dict(trainable(clip.model))
        generator = torch.Generator().manual_seed(5)
        for step in steps:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    if name.endswith("gate.score"):
                        parameter.fill_(draw_score(generator) if score is None else score)
                    else:
                        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            state = checkpoint_state(config, clip, "0" * 64, step, read_world({}))
            tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            save_checkpoint(directory, tensors, {"moment": torch.zeros(1)}, state, keep_last=9)
        _save_expected(directory / "expected.pt", clip, generator)
        return directory

    return make


def draw_score(generator: torch.Generator) -> float:
    """Half of the gates open, half closed."""
    import torch

    return 0.05 + 0.1 * float(torch.randint(2, (1,), generator=generator))


def _save_expected(file: Path, clip: Clip, generator: torch.Generator) -> None:
    import torch

    model = clip.model.eval()
    images = torch.randn(3, 3, 32, 32, generator=generator)
    tokens = clip.tokenizer(["a red fox", "the sea"])
    with torch.no_grad():
        torch.save(
            {
                "images": images,
                "tokens": tokens,
                "image_features": model.encode_image(images),  # pyright: ignore[reportCallIssue]
                "text_features": model.encode_text(tokens),  # pyright: ignore[reportCallIssue]
            },
            file,
        )


def write_broken(root: Path) -> Path:
    """Sixteen images of which number 11 ends in the middle of its pixels."""
    samples = [{"jpg": picture(i, i % 12, "jpg"), "cls": str(i % 12).encode()} for i in range(16)]
    samples[11]["jpg"] = samples[11]["jpg"][:300]
    texts = {
        "classnames.txt": "\n".join(CLASSNAMES),
        "zeroshot_classification_templates.txt": "\n".join(TEMPLATES),
    }
    return write_wds(root, samples, 2, texts)


@pytest.fixture(scope="session")
def make_broken() -> Callable[[Path], Path]:
    return write_broken


@pytest.fixture
def broken_set(tmp_path: Path) -> Path:
    return write_broken(tmp_path / "wds_broken")
