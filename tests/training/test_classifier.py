"""A ViT of timm as a classifier: its steps equal a plain loop's, and it survives the faults of a CLIP's training."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from pipeline.config import load_config
from pipeline.data.shards.index import load_index
from pipeline.data.train.stream import TrainDataset
from pipeline.model.restore import load_run
from pipeline.model.vit import Vit
from pipeline.training.checkpoint import latest_checkpoint
from pipeline.training.optim import lr_factor

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that timm loads by local-dir:."""
    from timm.models import save_for_hf

    directory = tmp_path_factory.mktemp("tiny_vit")
    torch.manual_seed(3)
    model = timm.create_model(ARCHITECTURE, num_classes=0, **ARGS)
    save_for_hf(model, str(directory), model_config={"model_args": ARGS}, safe_serialization=True)
    config = json.loads((directory / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def vit_config(config_file: Path, tiny_vit: Path) -> Path:
    content = yaml.safe_load(config_file.read_text())
    content["model"]["name"] = f"timm:local-dir:{tiny_vit}"
    content["train"] |= {"optimizer": "sgd", "lr": 0.05, "train_rest": "none", "weight_decay": 0.0}
    content["gate"]["lr"] = 0.02
    content["data"] |= {"flip": True, "crop_scale": [0.5, 1.0]}
    config_file.write_text(yaml.safe_dump(content))
    return config_file


def plain_run(config_file: Path, tiny_vit: Path, overrides: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Full fine-tuning of timm's own model by torch's own SGD over the same images, and nothing of ours in it."""
    config = load_config(config_file, overrides)
    index = load_index(config.data.train)
    data = TrainDataset(
        index,
        size=32,
        seed=config.seed,
        streams=config.data.streams,
        window=config.data.shuffle_window,
        crop_scale=config.data.crop_scale,
        flip=True,
    )
    model: Any = timm.create_model(f"local-dir:{tiny_vit}", pretrained=True, num_classes=4)
    # The classifier starts as ours does, from the first draws of the seed.
    run = Path(config.out) / config.name / "start.safetensors"
    model.head.load_state_dict(load_file(run))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    losses = []
    for step in range(12):
        samples = [data[position] for position in range(step * 16, step * 16 + 16)]
        images = (torch.stack([s.image for s in samples]) / 255 - mean) / std
        loss = F.cross_entropy(model(images), torch.tensor([s.label for s in samples]))
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * lr_factor(step, 2, 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_full_fine_tuning_is_the_plain_loop_and_resumes(launch, vit_config: Path, tiny_vit: Path) -> None:
    """On two ranks, and on two of which one is killed."""
    from safetensors.torch import save_file

    from pipeline.model.vit import load_vit

    overrides = ["name=full", "adapter.kind=full", "train.zero_stage=2"]
    run = launch(*overrides, config=vit_config)
    assert run.wait() == [0, 0], run.text()
    head = load_vit(f"timm:local-dir:{tiny_vit}", seed=0, classes=("a", "b", "c", "d")).model.head
    assert head is not None
    save_file(dict(head.state_dict()), run.directory / "start.safetensors")
    losses, weights = plain_run(vit_config, tiny_vit, overrides)
    assert [run.losses()[step] for step in range(1, 13)] == pytest.approx(losses, abs=2e-5)
    tuned = load_run(run.directory)
    assert isinstance(tuned, Vit)
    assert tuned.classes == tuple(sorted(tuned.classes or ()))
    from pipeline.model.weights import stock_state

    for name, value in stock_state(tuned.model.trunk).items():
        torch.testing.assert_close(value, weights[name], atol=2e-5, rtol=1e-3)
    killed_and_continued(launch, vit_config, run, *overrides[1:])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_killed_rank_costs_a_gated_classifier_nothing(launch, vit_config: Path, stage: int) -> None:
    common = (f"train.zero_stage={stage}", "adapter.kind=dora")
    undisturbed = launch("name=undisturbed", *common, config=vit_config)
    assert undisturbed.wait() == [0, 0], undisturbed.text()
    killed_and_continued(launch, vit_config, undisturbed, *common)


def killed_and_continued(launch, vit_config: Path, undisturbed: Any, *common: str) -> None:
    """Kill a run at its sixth step and start it again: it ends as the undisturbed one, to the bit."""
    killed = launch("name=killed", *common, config=vit_config)
    killed.signal_at(6, signal.SIGKILL, rank=1)
    assert killed.wait()[1] == -signal.SIGKILL
    cut = latest_checkpoint(killed.directory)
    assert cut is not None
    assert cut.step < 12
    resumed = launch("name=killed", *common, config=vit_config)
    assert resumed.wait() == [0, 0], resumed.text()
    assert resumed.losses() == undisturbed.losses()
    for name in ("trainable", "optimizer"):
        ours, theirs = (
            load_file(run.directory / f"checkpoints/step-00000012/{name}.safetensors") for run in (resumed, undisturbed)
        )
        assert ours.keys() == theirs.keys()
        assert any("momentum_buffer" in key for key in ours) == (name == "optimizer")
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_gates_close_the_head_trains_micro_batches_agree(launch, vit_config: Path) -> None:
    """Gates close the head trains and micro batches change nothing."""
    common = ("gate.lam=30", "train.momentum=0.5")
    whole = launch("name=whole", *common, world=1, config=vit_config)
    assert whole.wait() == [0], whole.text()
    parts = launch("name=parts", *common, "train.micro_batch_size=4", world=1, config=vit_config)
    assert parts.wait() == [0], parts.text()
    assert list(parts.losses().values()) == pytest.approx(list(whole.losses().values()), abs=2e-5)
    state = json.loads((whole.directory / "checkpoints/step-00000012/state.json").read_text())
    assert len(state["gate_map"]) == 12
    assert not all(gate["open"] for gate in state["gate_map"].values())
    assert state["model"]["classes"] == list(load_index(load_config(vit_config).data.train).classes or ())
    record = [json.loads(line) for line in (whole.directory / "journal.jsonl").read_text().splitlines()]
    values = next(r["values"] for r in record if r["kind"] == "metrics" and "train/accuracy" in r["values"])
    assert 0 <= values["train/accuracy"] <= 1
    assert "train/effective_negatives" not in values


def test_shards_without_classes_are_refused(launch, vit_config: Path, tmp_path: Path, image_folder) -> None:
    from pipeline.data.shards.index import pack

    folder = image_folder(classes=2, each=8, size=32)
    rows = [f"{path.relative_to(folder)}\ta photo" for path in sorted(folder.rglob("*.*")) if path.is_file()]
    table = folder / "captions.tsv"
    table.write_text("\n".join(["filepath\ttitle", *rows]))
    out = tmp_path / "captioned"
    pack(table, out, samples_per_shard=8)
    run = launch(f"data.train={out}", world=1, config=vit_config)
    assert run.wait() == [2]
    assert "is trained as a classifier, and these shards have no classes; pack class folders" in run.text()


def test_a_budget_of_parameters_holds_for_a_vit(launch, vit_config: Path) -> None:
    """What is open at the end has at most so many parameters, and no closed block would fit as well."""
    from pipeline.method.adapter import blocks
    from pipeline.method.budget import parameters_of
    from pipeline.model.restore import find_run, load_adapted
    from pipeline.runs.run import acting_parameters

    options = ("adapter.kind=dora", "gate.lam=0", "gate.budget_parameters=2000")
    run = launch(*options, world=1, config=vit_config)
    assert run.wait() == [0], run.text()
    found = blocks(load_adapted(find_run(run.directory)).model)
    kept = {name: parameters_of(block) for name, block in found.items() if block.is_open()}
    closed = {name: parameters_of(block) for name, block in found.items() if name not in kept}
    assert 0 < sum(kept.values()) <= 2000
    assert kept and closed
    assert min(closed.values()) > 2000 - sum(kept.values())
    whole = load_file(run.directory / "checkpoints/step-00000012/trainable.safetensors")
    assert acting_parameters(run.directory) == sum(map(torch.numel, whole.values())) - sum(closed.values())
