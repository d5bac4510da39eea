"""The figures on paper: known models come out exactly, formulas agree with the code, the page is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config, override
from pipeline.tuning import scale
from pipeline.tuning.scale import SHAPES, Machine
from pipeline.tuning.scale_page import page

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


def test_stages_below_three_move_only_what_trains_and_stage_three_the_whole_model() -> None:
    trained = B16.trained(16)
    low = [scale.gradient_traffic(stage, B16.parameters, trained, 8) for stage in (0, 1, 2)]
    assert low[0] == low[1] == low[2] == pytest.approx(2 * trained * 4 * 7 / 8)
    assert scale.gradient_traffic(3, B16.parameters, trained, 8) > 30 * low[0]
    assert scale.gradient_traffic(2, B16.parameters, trained, 1) == 0


def test_memory_falls_with_the_stage() -> None:
    memory = [scale.rank_memory(B16, stage, 64, trained=B16.trained(16), micro_batch=0) for stage in (1, 2, 3)]
    assert memory[0] > memory[1] > memory[2]


def test_efficiency_falls_with_nodes_and_rises_with_the_link() -> None:
    def at(nodes: int, gbit: float) -> float:
        return scale.efficiency(B16, 1, nodes, trained=B16.trained(16), micro_batch=64, machine=Machine(link_gbit=gbit))

    for gbit in (25.0, 400.0):
        found = [at(nodes, gbit) for nodes in (1, 2, 8, 64)]
        assert found == sorted(found, reverse=True)
        assert 0 < found[-1] < found[0] <= 1
    assert at(16, 400.0) > at(16, 25.0)


def test_a_plan_says_them_for_the_users_config() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "imagenet_vit_b16.yaml")
    text = scale.planned(config, ranks=8)
    assert "434.9 MB for ZeRO-1" in text
    assert "with 64 images" in text
    assert "of 149.6 M parameters" in text
    assert scale.planned(override(config, {"model.name": "local-dir:elsewhere"}), ranks=8) == ""


def test_the_page_is_what_the_module_says() -> None:
    """Written by: python -c "from pipeline.tuning.scale_page import page; print(page(), end='')" > docs/scaling.md"""
    assert (Path(__file__).parents[2] / "docs" / "scaling.md").read_text() == page()
