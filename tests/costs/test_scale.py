"""The computed figures: exact for known models, in agreement with the code, and current on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config, override
from pipeline.costs import scale
from pipeline.costs.planned import planned
from pipeline.costs.scale import SHAPES, Hardware
from pipeline.costs.scale_page import page

B16 = SHAPES["ViT-B-16"]


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    # open_clip's own model table: parameters, and GFLOPs of which it counts two per multiply-accumulate
    [("ViT-B-16", 149_620_737, 41.09 / 2), ("ViT-L-14", 427_616_513, 175.33 / 2), ("ViT-bigG-14", None, 1065.36 / 2)],
)
def test_known_models_have_their_size(name: str, parameters: int | None, gmacs: float) -> None:
    shape = SHAPES[name]
    if parameters is not None:
        assert shape.parameters == parameters
    assert shape.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_adapters_are_counted_as_the_method_attaches_them(kind) -> None:
    from torch import nn

    from pipeline.method.adapter import attach_adapter

    width, mlp, layers = 16, 40, 2
    sizes = {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width)), "fc1": (width, mlp)}
    sizes["fc2"] = (mlp, width)
    modules = [nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(layers)]
    targets = {f"image.{n}.{name}": (layer, name) for n, layer in enumerate(modules) for name in sizes}
    attach_adapter(targets, rank=4, kind=kind)
    trained = sum(p.numel() for layer in modules for p in layer.parameters() if p.requires_grad)
    tower = scale.Tower(layers, width, mlp, heads=2, tokens=5, outside=0)
    assert tower.adapter_parameters(4, dora=kind == "dora") == trained


def test_only_stage_three_moves_the_whole_model() -> None:
    """Stages below three move only what trains and stage three the whole model."""
    trained = B16.trained(16)
    low = [scale.gradient_traffic(stage, B16.parameters, trained, 8) for stage in (0, 1, 2)]
    assert low == pytest.approx([times * trained * 4 * 7 / 8 for times in (2, 3, 3)])
    assert scale.gradient_traffic(3, B16.parameters, trained, 8) > 20 * low[2]
    assert scale.gradient_traffic(2, B16.parameters, trained, 1) == 0


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_traffic_of_the_loss_is_what_its_collectives_send(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pipeline.method import contrastive

    sent = []

    def all_gather(parts: list, local: torch.Tensor, group: object) -> None:
        sent.append(local.nbytes * (ranks - 1))
        for part in parts:
            part.copy_(local)

    monkeypatch.setattr(contrastive, "rank_and_world", lambda group: (0, ranks))
    monkeypatch.setattr(contrastive.dist, "all_gather", all_gather)
    monkeypatch.setattr(
        contrastive.dist, "all_reduce", lambda whole, group: sent.append(2 * whole.nbytes * (ranks - 1) / ranks)
    )
    image, text = (torch.randn(6, 16, requires_grad=True) for _ in range(2))
    contrastive.flyp_loss(image, text, torch.tensor(10.0)).backward()
    assert sum(sent) == scale.contrastive_traffic(6 * ranks, 16, ranks)


def test_memory_falls_with_the_stage() -> None:
    memory = [scale.rank_memory(B16, stage, 64, trained=B16.trained(16), images=0) for stage in (1, 2, 3)]
    assert memory[0] > memory[1] > memory[2]


def test_recomputation_lowers_memory_and_raises_hours() -> None:
    """What is computed again lowers the memory and raises the hours."""
    config = load_config(Path(__file__).parents[2] / "configs" / "imagenet_vit_b16.yaml")
    changes = {"train.micro_batch_size": 16, "train.activation_checkpointing": True}
    ways = [{}, *({key: value} for key, value in changes.items()), changes]
    texts = [planned([override(config, way)], ranks=8) for way in ways]
    held, computed = (
        [float(text.partition(word)[2].split()[0]) for text in texts] for word in ("a rank holds ", "a step computes ")
    )
    assert held[0] > 2 * held[1] > held[2] > held[3]
    assert computed == pytest.approx([part / 2 * computed[0] for part in (2, 3, 3, 4)], rel=1e-2)
    assert "more hours" not in texts[0]
    assert "with 64 images and bf16 activations, 16 of them at a time, one layer at a time" in texts[3]
    assert "4 passes instead of 2, so 100% more hours" in texts[3]
    assert planned([override(config, {"train.micro_batch_size": 64})], ranks=8) == texts[0]


def test_efficiency_falls_with_nodes_and_rises_with_the_link() -> None:
    def at(nodes: int, gbit: float) -> float:
        return scale.efficiency(B16, 1, nodes, trained=B16.trained(16), images=64, machine=Hardware(link_gbit=gbit))

    for gbit in (25.0, 400.0):
        found = [at(nodes, gbit) for nodes in (1, 2, 8, 64)]
        assert found == sorted(found, reverse=True)
        assert 0 < found[-1] < found[0] <= 1
    assert at(16, 400.0) > at(16, 25.0)


def test_a_plan_says_them_for_the_trial_that_trains_most() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "imagenet_vit_b16.yaml")
    trials = [config, override(config, {"adapter.kind": "full"}), override(config, {"adapter.rank": 4})]
    text = planned(trials, ranks=8)
    assert "652.3 MB per rank for ZeRO-1" in text
    # What a ring moves grows with (ranks - 1) / ranks, and that is all.
    seven_eighths = sum(float(text.partition(word)[2].split()[0]) for word in ("moves ", "and "))
    volumes = text.partition("global batch: ")[2].partition(" MB")[0].split(", ")
    expected = [seven_eighths * 8 / 7 * (ranks - 1) / ranks for ranks in (16, 32, 64, 128)]
    assert [float(volume) for volume in volumes] == pytest.approx(expected, rel=1e-3)
    assert "with 64 images" in text
    assert "of 149.6 M parameters train" in text
    assert planned(trials[1:2], ranks=8) == ""
    assert planned([override(config, {"model.name": "RN50"})], ranks=8) == ""


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_those_of_open_clips_own_configs(name: str) -> None:
    from pipeline.model.clip import model_config

    assert scale.shape_of(name, model_config(name)) == SHAPES[name]


def test_the_shape_of_a_model_on_the_disk_is_that_of_the_model() -> None:
    from pipeline.demo.assets import MODEL, asset
    from pipeline.model.clip import load_clip, model_config

    name = f"local-dir:{asset(MODEL)}"
    shape = scale.shape_of(name, model_config(name))
    assert shape is not None
    assert shape.parameters == sum(parameter.numel() for parameter in load_clip(name).model.parameters())


def test_the_page_is_current() -> None:
    """Written by: python -c "from pipeline.costs.scale_page import page; print(page(), end='')" > docs/scaling.md"""
    assert (Path(__file__).parents[2] / "docs" / "scaling.md").read_text() == page()


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    # timm's own tables: parameters without the head, multiply-accumulates
    [("vit_small_patch16_224", 21_665_664, 4.61), ("vit_base_patch16_224", 85_798_656, 17.58)],
)
def test_a_vit_has_the_size_that_timm_gives_it(name: str, parameters: int, gmacs: float) -> None:
    shape = scale.vit_shape(f"timm:{name}")
    assert shape.parameters == parameters
    assert shape.macs / 1e9 == pytest.approx(gmacs, rel=0.02)
    assert shape.text is None
    assert scale.loss_traffic(shape, 512, 8) == 0
    assert scale.rank_memory(shape, 1, 8, trained=shape.trained(16), images=64) > 4 * parameters


def test_a_plan_knows_vits_and_reference_samples() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "imagenet_vit_b16.yaml")
    vit = planned([override(config, {"model.name": "timm:vit_small_patch16_224"})], ranks=8)
    assert "0.0 MB for the loss" in vit
    assert "of 21.7 M parameters train" in vit
    plain, kept = (
        planned([override(config, {"keep.weight": weight, "keep.batch_size": 64})], ranks=8) for weight in (0.0, 1.0)
    )
    assert "with 64 images and bf16" in plain
    assert "with 72 images, 8 of them reference samples, and bf16" in kept
    computed = [float(text.partition("a step computes ")[2].split()[0]) for text in (plain, kept)]
    assert computed[1] / computed[0] == pytest.approx(72 / 64, rel=1e-2)


def test_a_plan_says_how_often_to_write_checkpoints() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "imagenet_vit_b16.yaml")
    line = next(line for line in planned([config], ranks=64).splitlines() if "a checkpoint every" in line)
    assert "on 8 nodes of 8 H100s" in line
    best, given = (float(part.split("%")[0]) for part in line.split(" keeps ")[1:])
    assert 80 < given < best < 100
    assert f"train.checkpoint_every={config.train.checkpoint_every}" in line


def test_short_texts_cost_less() -> None:
    short = B16.with_captions()
    assert short.parameters == B16.parameters
    assert short.macs < B16.macs
    assert short.activation_bytes(512, 1, 2) < B16.activation_bytes(512, 1, 2)
