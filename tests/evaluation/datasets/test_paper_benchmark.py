"""All 18 sets of the paper's benchmark on stand-ins: right layout and class counts, few images, two ranks, one of the
runs killed in the ninth set; against clip_benchmark's own functions and FLYP's rules written out."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from ports import free_port
from sklearn.metrics import balanced_accuracy_score

from pipeline.config.templates import TEMPLATES
from pipeline.evaluation.datasets.benchmark import load_benchmark, shipped_benchmarks
from pipeline.evaluation.datasets.rows import Row
from pipeline.model.clip import Clip, load_clip, save_open_clip

pytestmark = pytest.mark.timeout(1500)  # the fixture starts four processes, and CI machines are shared

ROWS = {row.key: row for row in load_benchmark("paper", "/nowhere").rows}
CLASSIFIED = [key for key, row in ROWS.items() if not row.is_retrieval]
PAIRED = [key for key, row in ROWS.items() if row.is_retrieval]
NINTH = "dtd"
IMAGES = {key: 301 if key == NINTH else 21 for key in ROWS}
BATCH = 4

# What the folders say themselves; in mode paper most of it must give way to the rows.
SHIPPED_NAMES = {
    "cifar100": lambda row: [name.replace(" ", "_") for name in row.spellings],
    "sun397": lambda row: [name.replace("/", " ") for name in row.spellings],
    "pets": lambda row: list(row.spellings),
}


def picture(seed: int, red_border: bool) -> bytes:
    draw = np.random.default_rng(seed)
    height, width = draw.integers(36, 60, 2)
    colours = draw.integers(0, 256, (2, 2, 3)).astype("uint8")
    image = Image.fromarray(colours).resize((int(width), int(height)), Image.Resampling.BILINEAR)
    if red_border:  # ObjectNet's frame: whoever leaves it on gets other pixels
        framed = Image.new("RGB", image.size, (255, 0, 0))
        framed.paste(image.crop((2, 2, image.width - 2, image.height - 2)), (2, 2))
        image = framed
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def plain_subset_file(name: str) -> list[list[int]]:
    file = shipped_benchmarks()["paper"].parent / "names" / name
    lines = [line.split("#")[0].split() for line in file.read_text().splitlines()]
    return [[int(number) for number in line] for line in lines if line]


def flyp_projection(key: str, logits: torch.Tensor) -> torch.Tensor:
    """What FLYP does with 1000 logits: class_sublist_mask of ImageNet-A and -R, project_logits of ObjectNet."""
    if key in ("imagenet-a", "imagenet-r"):
        sublist = {ids[0] for ids in plain_subset_file(key.replace("-", "_") + "_ids.txt")}
        return logits[:, [i in sublist for i in range(1000)]]
    if key == "objectnet":
        projected = np.zeros((len(logits), 113))
        for k, ids in enumerate(plain_subset_file("objectnet_ids.txt")):
            projected[:, k] = np.max(logits.numpy()[:, ids], axis=1)
        return torch.tensor(projected)
    return logits


def plain_names(row: Row, shipped: Sequence[str]) -> list[str]:
    return list(row.classnames or row.spellings or shipped)


@dataclass
class StandIns:
    """The folders, what two ranks made of them, and what clip_benchmark says of the same images."""

    root: Path
    out: Path
    clip: Clip
    transform: Any
    first_said: list[str]
    second_said: str
    logits: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]

    def result(self, key: str) -> dict[str, Any]:
        return json.loads((self.out / f"{key}.json").read_text())


@pytest.fixture(scope="module")
def sharp_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP whose image tower is steep, so that it names many classes and not one for all images."""
    root = tmp_path_factory.mktemp("sharp_clip")
    towers = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    }
    look = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    (root / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers, "preprocess_cfg": look}))
    clip = load_clip(f"local-dir:{root}", seed=3)
    with torch.no_grad():
        for name, parameter in clip.model.named_parameters():
            if name.startswith("visual.") and parameter.ndim >= 2:
                parameter.mul_(3)
    return save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, tmp_path_factory.mktemp("sharp"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, sharp_clip_dir: Path, write_wds: Any) -> StandIns:
    root = tmp_path_factory.mktemp("stand_ins")
    clip = load_clip(f"local-dir:{sharp_clip_dir}")
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**clip.preprocess_cfg), is_train=False
    )
    found = StandIns(root, root / "out", clip, transform, [], "", {}, {})
    heads: dict[Any, torch.Tensor] = {}
    for number, key in enumerate(ROWS):
        (write_paired if key in PAIRED else write_classified)(found, key, number, heads, write_wds)
    counts = ", ".join(f"{key}: {n}" for key, n in IMAGES.items())
    (root / "small.yaml").write_text(f"include: paper\nroot: .\nimages: {{{counts}}}\n")
    run_with_a_kill(found, sharp_clip_dir)
    return found


def write_classified(found: StandIns, key: str, number: int, heads: dict[Any, torch.Tensor], write_wds: Any) -> None:
    """Half of the labels are what the reference says, so that there is something right and something wrong."""
    row = ROWS[key]
    assert row.classes is not None
    shipped = SHIPPED_NAMES.get(key, lambda row: [f"{key} {i}" for i in range(row.classes)])(row)
    names, templates = plain_names(row, shipped), list(row.templates or ())
    images = [picture(1000 * number + i, key == "objectnet") for i in range(IMAGES[key])]
    pixels = torch.stack([plain_pixels(found, key, data) for data in images])
    head_key = tuple(names), tuple(templates)
    if head_key not in heads:
        heads[head_key] = zeroshot_classification.zero_shot_classifier(
            found.clip.model, found.clip.tokenizer, names, templates, "cpu", amp=False
        )
    unlabelled = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in pixels.split(BATCH)]
    logits, _ = zeroshot_classification.run_classification(
        found.clip.model, heads[head_key], unlabelled, "cpu", amp=False
    )
    found.logits[key] = flyp_projection(key, logits)
    labels = np.random.default_rng(number).integers(0, row.classes, len(images))
    labels[::2] = found.logits[key].argmax(dim=1)[::2].numpy()
    found.labels[key] = torch.tensor(labels)
    samples = [{"png": data, "cls": str(label).encode()} for data, label in zip(images, labels, strict=True)]
    texts = {"classnames.txt": "\n".join(shipped), "zeroshot_classification_templates.txt": "not this one {c}"}
    write_wds(found.root / Path(row.path).name, samples, 2, texts)


def plain_pixels(found: StandIns, key: str, data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if key == "objectnet":
        image = image.crop((2, 2, image.width - 2, image.height - 2))
    return found.transform(image)


def write_paired(found: StandIns, key: str, number: int, heads: dict[Any, torch.Tensor], write_wds: Any) -> None:
    samples = []
    for i in range(IMAGES[key]):
        captions = "\n".join(f"{word} thing {i} of {key}" for word in ("red", "small", "old", "new", "round"))
        samples.append({"png": picture(1000 * number + i, False), "txt": captions.encode()})
    write_wds(found.root / Path(ROWS[key].path).name, samples, 2, {"dataset_type.txt": "retrieval"})


def start(found: StandIns, model: Path) -> list[subprocess.Popen[str]]:
    port = free_port()
    command = [sys.executable, "-m", "pipeline", "evaluate", str(model), "--benchmark", str(found.root / "small.yaml")]
    command += ["--out", str(found.out), "--batch-size", str(BATCH), "--workers", "0"]
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            command,
            env=os.environ | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]


def run_with_a_kill(found: StandIns, model: Path) -> None:
    """kill -9 in the ninth set; then the same command runs again, and leaves the first eight results as they are."""
    ranks = start(found, model)
    try:
        assert ranks[0].stdout is not None
        for line in ranks[0].stdout:
            found.first_said.append(line)
            if line.startswith(list(ROWS)[7] + ":"):
                break
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
        for process in ranks:
            process.communicate()
    done = sorted(file.stem for file in found.out.glob("*.json"))
    assert done == sorted(list(ROWS)[:8]), found.first_said
    written = {key: (found.out / f"{key}.json").stat().st_mtime_ns for key in done}
    ranks = start(found, model)
    try:
        said = [process.communicate(timeout=500)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
    found.second_said = said[0]
    assert {key: (found.out / f"{key}.json").stat().st_mtime_ns for key in done} == written


def test_the_killed_run_goes_on_in_the_ninth_set(stand_ins: StandIns) -> None:
    assert list(ROWS)[8] == NINTH
    again = re.findall(r"^(\S+): .* \(finished before, skipped\)$", stand_ins.second_said, re.MULTILINE)
    assert again == list(ROWS)[:8]
    assert set(ROWS) <= {file.stem for file in stand_ins.out.glob("*.json")}


def test_classification_sets_agree_with_clip_benchmark(stand_ins: StandIns) -> None:
    """One test for all, as each process that runs one of them would pay for the fixture."""
    for key in CLASSIFIED:
        result, logits, labels = stand_ins.result(key), stand_ins.logits[key], stand_ins.labels[key]
        acc1, acc5 = zeroshot_classification.accuracy(logits, labels, topk=(1, 5))
        predicted = logits.argmax(dim=1)
        assert (key, result["n"], result["classes"]) == (key, IMAGES[key], ROWS[key].classes)
        found = result["metrics"]
        assert (key, found["acc1"], found["acc5"]) == (key, acc1, acc5)
        assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, predicted)), key
        cells = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
        assert {(true, said): n for true, said, n in result["confusion"]} == cells, key
        assert 0.4 < acc1 < 0.9, key
        assert len(set(predicted.tolist())) > 3, "a model that says one thing would agree with any rule"


def test_retrieval_sets_agree_with_clip_benchmark(stand_ins: StandIns) -> None:
    """Every retrieval set has the numbers of clip_benchmark and the paper's names."""
    clip = stand_ins.clip
    for key in PAIRED:
        folder = stand_ins.root / Path(ROWS[key].path).name
        dataset = build_dataset(
            f"wds/{folder.name}",
            root=str(folder),
            transform=stand_ins.transform,
            split="test",
            task="zeroshot_retrieval",
        )
        loader = torch.utils.data.DataLoader(dataset.batched(BATCH), batch_size=None, num_workers=0)
        expected = zeroshot_retrieval.evaluate(
            clip.model, loader, clip.tokenizer, device="cpu", amp=False, recall_k_list=[1, 5, 10]
        )
        result = stand_ins.result(key)
        assert result["metrics"] == pytest.approx(expected, abs=1e-6)
        assert result["paper"]["IR@5"] == result["metrics"]["text_retrieval_recall@5"]
        assert result["paper"]["TR@1"] == result["metrics"]["image_retrieval_recall@1"]
        assert (result["n"], result["texts"]) == (IMAGES[key], 5 * IMAGES[key])


def test_the_means_are_those_of_the_papers_tables(stand_ins: StandIns) -> None:
    summary = json.loads((stand_ins.out / "summary.json").read_text())
    values = {key: stand_ins.result(key)["value"] for key in ROWS}
    shifts = ["imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet"]
    nine = ["cifar10", "cifar100", "dtd", "mnist", "sun397", "fgvc_aircraft", "flowers", "food101", "pets"]
    recalls = [stand_ins.result(key)["paper"][f"{side}@{k}"] for key in PAIRED for side in ("IR", "TR") for k in (1, 5)]
    inner = {
        "shift": np.mean([values[key] for key in shifts]),
        "zero-shot": np.mean([values[key] for key in nine]),
        "retrieval": np.mean(recalls),
    }
    assert len(recalls) == 8
    for group, mean in inner.items():
        assert summary["groups"][group]["mean"] == pytest.approx(mean)
        assert summary["groups"][group]["with_id"] == pytest.approx((values["imagenet"] + mean) / 2)


def test_a_wrong_number_of_images_is_refused(stand_ins: StandIns) -> None:
    from pipeline.config import ConfigError
    from pipeline.evaluation.datasets.dataset import open_dataset

    row = next(row for row in load_benchmark("paper", stand_ins.root).rows if row.key == "objectnet")
    with pytest.raises(ConfigError, match=r"objectnet: 21 images in .* where 18574 are expected: .*interrupted"):
        open_dataset(row)


def test_the_lists_of_class_ids_are_what_their_authors_say() -> None:
    names = ROWS["imagenet"].classnames or ()
    a, r, o = (list(ROWS[key].subset or ()) for key in ("imagenet-a", "imagenet-r", "objectnet"))
    assert (len(names), len(a), len(r), len(o)) == (1000, 200, 200, 113)
    assert list(a) == sorted(a)
    assert list(r) == sorted(r)
    assert (sum(len(ids) for ids in o), sum(len(ids) > 1 for ids in o)) == (125, 9)
    # Spot checks by name: goldfish and scorpions are in R, stingray and scorpion in A, ObjectNet's bicycles are two.
    assert {"goldfish", "great white shark"} <= {names[i] for (i,) in r}
    assert {"stingray", "scorpion"} <= {names[i] for (i,) in a}
    assert {names[i] for i in o[7]} == {"mountain bike", "tandem bicycle"}
    assert ROWS["objectnet"].border == 2


def test_the_texts_are_those_of_open_clip_and_clip_benchmark() -> None:
    folder = Path(zeroshot_classification.__file__).parent.parent / "datasets"
    theirs = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    same = {"imagenet": "imagenet1k", "cifar10": "cifar10", "cifar100": "cifar100", "dtd": "dtd", "mnist": "mnist"}
    same |= {"sun397": "sun397", "fgvc_aircraft": "fgvc_aircraft", "flowers": "flowers", "pets": "pets"}
    for key, name in same.items():
        assert list(ROWS[key].templates or ()) == theirs[name], key
    assert list(ROWS["imagenet"].classnames or ()) == list(open_clip.IMAGENET_CLASSNAMES)
    assert ROWS["imagenet"].templates == TEMPLATES["openai"]
    assert {row.templates for row in ROWS.values() if row.group in ("id", "shift")} == {TEMPLATES["openai"]}
