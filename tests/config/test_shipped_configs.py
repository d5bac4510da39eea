"""Every config in configs/ is valid for `selora train`, and the base repeats the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config, flatten, load_config, load_config_with_origin, override

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_shipped_config_is_valid_and_describes_its_use(file):
    """Shipped config is valid and says where it trains and runs."""
    config, origin = load_config_with_origin(CONFIGS / file)
    assert origin["data.train"] != "default"
    assert (origin["name"] != "default") == (file != "base.yaml")
    assert override(config, {}) == config


def test_shipped_configs_have_run_directories_of_their_own():
    names = [load_config(CONFIGS / file).name for file in FILES]
    assert len(set(names)) == len(names)


def test_base_states_the_defaults():
    config, origin = load_config_with_origin(CONFIGS / "base.yaml")
    given = [key for key in origin if origin[key] != "default"]
    default = flatten(Config.model_validate({"data": {"train": "shards/train"}}))
    differs = {key for key in given if flatten(config)[key] != default[key]}
    assert differs == {"model.pretrained"}
    assert len(given) > 10


def test_the_baselines_differ_from_the_paper_run_in_one_option():
    paper = flatten(load_config(CONFIGS / "imagenet_vit_b16.yaml"))
    for file, option in [
        ("imagenet_vit_b16_dora.yaml", "adapter.kind"),
        ("imagenet_vit_b16_flyp.yaml", "adapter.kind"),
        ("imagenet_vit_b16_lora_ungated.yaml", "gate.enabled"),
    ]:
        other = flatten(load_config(CONFIGS / file))
        assert {key for key in paper if paper[key] != other[key]} == {"name", option}


def test_a_gate_can_close_within_the_steps_of_own_data():
    config = load_config(CONFIGS / "own_data.yaml")
    assert config.gate.lr is not None
    assert config.train.steps is not None
    travel = config.gate.lr * config.train.steps / 2
    assert travel > 2 * (config.gate.init - config.gate.threshold)
