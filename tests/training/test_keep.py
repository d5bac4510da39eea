"""Section keep in training: reference samples, the features of the untouched model, resume, mistakes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import ConfigError, load_config
from pipeline.data.shards.index import load_index, open_shard
from pipeline.training.checkpoint import latest_checkpoint
from pipeline.training.cluster.distributed import World
from pipeline.training.reference import build_reference

KEEP = ("keep.weight=3", "keep.batch_size=8")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def reference_shards(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """80 captioned images in 4 shards."""
    from pipeline.data.shards.index import pack

    folder = image_folder(classes=2, each=40, size=40, seed=5)
    table = folder / "reference.csv"
    images = sorted(folder.rglob("*.jpg"))
    rows = [f"{path.relative_to(folder)},picture {number}" for number, path in enumerate(images)]
    table.write_text("image,caption\n" + "\n".join(rows) + "\n")
    out = tmp_path_factory.mktemp("reference") / "shards"
    pack(table, out, samples_per_shard=20)
    return out


def values_of(run: Any, name: str) -> dict[int, float]:
    """step -> a value of the journal."""
    records = [json.loads(line) for line in (run.directory / "journal.jsonl").read_text().splitlines()]
    return {r["step"]: r["values"][name] for r in records if r["kind"] == "metrics" and name in r["values"]}


def built(config_file: Path, *overrides: str, world: World | None = None) -> Any:
    """The untouched model of a config, and its reference data."""
    from pipeline.training.cluster.distributed import read_world
    from pipeline.training.model import load_untouched

    config = load_config(config_file, [*KEEP, *overrides])
    model = load_untouched(config)
    return model, build_reference(config, model, world or read_world())


def ranks_of(count: int, rank: int = 0) -> World:
    from dataclasses import replace

    from pipeline.training.cluster.distributed import read_world

    return replace(read_world(), rank=rank, world_size=count)


def test_features_are_those_of_the_untouched_model(config_file, reference_shards) -> None:
    model, reference = built(config_file, f"keep.images={reference_shards}", "data.preprocessing=reference")
    mean, std = (torch.tensor(model.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    for part in (reference.batch(0, 0, 1).tensors, reference.batch(3, 0, 1).tensors, reference.held()):
        with torch.no_grad():
            image, text, _ = model.model((part.images / 255 - mean) / std, part.tokens)
        torch.testing.assert_close(part.image_features, image, rtol=0, atol=1e-6)
        torch.testing.assert_close(part.text_features, text, rtol=0, atol=1e-6)


def test_reference_images_are_read_as_for_evaluation(config_file, reference_shards) -> None:
    from pipeline.data.images import decode, eval_resize
    from pipeline.data.reference.features import stored_image

    model, reference = built(config_file, f"keep.images={reference_shards}")
    index = load_index(reference_shards)
    stored = []
    for shard in range(len(index.shards)):
        tar = open_shard(index, shard)
        stored += [eval_resize(decode(stored_image(tar, i)), model.preprocess_cfg) for i in range(len(tar))]
    known = {each.numpy().tobytes() for each in stored}
    assert all(each.numpy().tobytes() in known for each in reference.batch(0, 0, 1).tensors.images)


def test_a_vit_needs_no_captions_and_ignores_them(config_file, reference_shards, vit_dir) -> None:
    vit = (f"model.name=timm:local-dir:{vit_dir(depth=2)}", "adapter.towers=[image]")
    _, reference = built(config_file, f"keep.images={reference_shards}", *vit)
    for part in (reference.batch(0, 0, 1).tensors, reference.held()):
        assert len(part.images) == len(part.image_features) > 0
        assert len(part.tokens) == len(part.text_features) == 0


def test_ranks_share_reference_samples_but_not_the_held(config_file, reference_shards) -> None:
    """Ranks share the samples of a step and leave out the held."""
    _, reference = built(config_file, f"keep.images={reference_shards}")

    def seen(part: Any) -> set[bytes]:
        return {each.numpy().tobytes() for each in part.images}

    held = seen(reference.held())
    assert len(held) == 16
    trained: set[bytes] = set()
    for step in range(8):  # an epoch of the 64 that are trained on
        whole = reference.batch(step, 0, 1).tensors
        for world in (2, 4):
            parts = [reference.batch(step, rank, world).tensors for rank in range(world)]
            assert {len(part.images) for part in parts} == {8 // world}
            assert set().union(*map(seen, parts)) == seen(whole)
            # captions and texts of the list, both in equal parts
            assert {len(part.tokens) for part in parts} == {16 // world}
        trained |= seen(whole)
    assert len(trained) == 64
    assert not trained & held


def test_features_are_computed_once_and_shared(config_file, reference_shards, own_cache, monkeypatch) -> None:
    from pipeline.data.reference import features

    _, first = built(config_file, f"keep.images={reference_shards}")
    entries = list(own_cache.glob("files/*/features.safetensors"))
    assert len(entries) == 5  # four shards and the list of texts
    damaged = entries[0]
    content = damaged.read_bytes()
    damaged.unlink()  # whoever has it open keeps what was there
    damaged.write_bytes(content[:100])
    computed = []
    for name in ("_encode_texts", "_encode_shard"):
        before = getattr(features, name)
        monkeypatch.setattr(features, name, lambda *a, b=before, n=name: (computed.append(n), b(*a))[1])
    _, second = built(config_file, f"keep.images={reference_shards}")
    assert len(computed) <= 2  # what was damaged, and nothing else
    for one, other in zip(first.held(), second.held(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_step_is_task_and_distance_by_their_formulas(config_file, reference_shards, kind) -> None:
    """One forward over the joined batch gives the loss and gradients of two separate ones."""
    from pipeline.method.contrastive import flyp_loss
    from pipeline.method.keep import keep_loss
    from pipeline.training.model import attach_blocks, objective_of

    overrides = (f"keep.images={reference_shards}", f"adapter.kind={kind}", "gate.lam=0", "keep.replay=0.5")
    model, reference = built(config_file, *overrides)
    config = load_config(config_file, [*KEEP, *overrides])
    attach_blocks(config, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.requires_grad and not name.endswith(("score", "logit_scale")):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    objective = objective_of(config, model).double()
    part = reference.batch(0, 0, 1).tensors
    part = part._replace(image_features=part.image_features.double(), text_features=part.text_features.double())
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 100, (6, 8), generator=generator)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        objective.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}

    losses = objective(images, tokens, 0, part)
    found = gradients(losses["total"])
    image, text, scale = model.model(objective._normalized(images), tokens)
    near_image, near_text, _ = model.model(objective._normalized(part.images), part.tokens)
    expected = (
        flyp_loss(image, text, scale)
        + 3 * keep_loss(near_image, part.image_features, near_text, part.text_features)
        + 0.5 * flyp_loss(near_image, near_text[:8], scale)
    )
    torch.testing.assert_close(losses["total"], expected, rtol=0, atol=1e-12)
    for name, value in gradients(expected).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    micro = objective_of(load_config(config_file, [*KEEP, *overrides, "train.micro_batch_size=4"]), model).double()
    torch.testing.assert_close(micro(images, tokens, 0, part)["total"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_a_killed_run_with_keep_resumes_bit_for_bit(launch, reference_shards, stage: int) -> None:
    common = (*KEEP, f"keep.images={reference_shards}", "data.workers=1", f"train.zero_stage={stage}")
    undisturbed = launch("name=undisturbed", *common)
    assert undisturbed.wait() == [0, 0], undisturbed.text()
    killed = launch("name=killed", *common)
    killed.signal_at(6, signal.SIGKILL, rank=1)
    killed.wait()
    interrupted = latest_checkpoint(killed.directory)
    assert interrupted is not None
    assert interrupted.step < 12
    resumed = launch("name=killed", *common)
    assert resumed.wait() == [0, 0], resumed.text()
    for name in ("train/loss", "train/keep"):
        assert values_of(resumed, name) == values_of(undisturbed, name)
    assert len(resumed.losses()) == 12
    last = values_of(undisturbed, "keep/drift_image")
    assert {4, 8, 12} <= last.keys()
    assert (
        last.items() <= values_of(resumed, "keep/drift_image").items()
    )  # a resumed run records its first step as well
    assert "drift image" in undisturbed.text()
    ours, theirs = (
        load_file(run.directory / "checkpoints/step-00000012/trainable.safetensors") for run in (resumed, undisturbed)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("keep.texts=null",), "keep.weight: 3 without any reference data"),
        (("keep.replay=0.1",), "keep.replay: 0.1 needs captioned images"),
        (
            ("keep.texts=missing.txt",),
            "keep.texts: missing.txt: cannot be read (No such file or directory), or use keep.texts=general",
        ),
        (("keep.images=nowhere",), "keep.images=nowhere: nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line_each(config_file, overrides, message) -> None:
    with pytest.raises(ConfigError) as caught:
        built(config_file, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_that_ranks_cannot_share_names_one_that_they_can(config_file) -> None:
    with pytest.raises(ConfigError, match="keep.batch_size: 8 reference samples cannot be shared by 3 ranks; 9 would"):
        built(config_file, world=ranks_of(3))


def test_a_reference_text_file_must_be_utf_8_and_hold_sentences(config_file, tmp_path) -> None:
    from pipeline.data.reference.texts import reference_texts

    file = tmp_path / "texts.txt"
    file.write_bytes("a dog\nein Mädchen\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"keep.texts: .*texts.txt:2: byte 0xe4 .* is not UTF-8"):
        built(config_file, f"keep.texts={file}")
    file.write_text(" \n\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no sentence"):
        built(config_file, f"keep.texts={file}")
    file.write_text("\ufeffa dog\n\na cat\na dog\n", encoding="utf-8")
    assert reference_texts(str(file)) == ["a dog", "a cat"]


def test_a_bad_reference_image_is_replaced_and_counted(launch, tmp_path, image_folder) -> None:
    from pipeline.data.shards.index import pack

    folder = image_folder(classes=2, each=24, size=40, seed=6)
    path = folder / "class_0" / "003.jpg"
    path.write_bytes(path.read_bytes()[:300])
    out = tmp_path / "reference"
    pack(folder, out, samples_per_shard=16, check="none")
    common = (*KEEP, f"keep.images={out}", "keep.texts=null", "train.steps=10")
    run = launch(*common, "data.max_bad_share=0.1", world=1)
    assert run.wait() == [0], run.text()
    assert max(values_of(run, "data/bad_samples").values()) == 1
    refused = launch(*common, "name=refused", "data.max_bad_share=0.001", world=1)
    assert refused.wait() == [2]
    assert "class_0" in refused.text() or "cannot be decoded" in refused.text()
