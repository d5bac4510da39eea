"""The config tree: refused values, their messages, and the origin of each value."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import (
    Config,
    ConfigError,
    describe,
    digest,
    flatten,
    load_config,
    load_config_with_origin,
    override,
    to_yaml,
)

MINIMAL = "data: {train: shards}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text, name="c.yaml") -> path relative to the (changed) working directory, as a user would type it."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "c.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("adapter.rnak=4", "adapter.rank"),
        ("adaptor.rank=4", "adapter.rank"),
        ("rank=4", "adapter.rank"),
        ("adapter.lam=1", "gate.lam"),
        ("train.lam=1", "gate.lam"),
        ("lambda=1", None),
        ("sede=1", "seed"),
        ("trian.zero_stage=1", "train.zero_stage"),
        ("adapter.rank.value=1", "adapter.rank"),
    ],
)
def test_unknown_key_says_which_one_was_meant(write, typed, meant):
    (message,) = faults(write(MINIMAL), typed)
    assert message.startswith(f"{typed.partition('=')[0]}: unknown option")
    assert (f"did you mean {meant}" in message) if meant else ("did you mean" not in message)


def test_name_that_several_sections_have_offers_all_of_them(write):
    (message,) = faults(write(MINIMAL), "lr=1e-3")
    assert "did you mean gate.lr or train.lr?" in message


def test_unknown_key_lists_the_keys_of_its_section(write):
    """Unknown key in a known section without a near one lists the section."""
    (message,) = faults(write(MINIMAL), "eval.colour=red")
    assert "eval has benchmark, root, datasets, batch_size, workers, preprocessing" in message


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("adapter.rank=x", "should be a valid integer, got 'x'"),
        ("adapter.rank=true", "should be a valid integer, got True"),
        ("adapter.rank=4.5", "got 4.5"),
        ("adapter.rank=4.0", "should be a valid integer, got 4.0"),
        ("adapter.rank='4'", "should be a valid integer, got '4'"),
        ("adapter.rank=0", "should be greater than or equal to 1, got 0"),
        ("adapter.rank=null", "should be a valid integer, got None"),
        ("adapter.kind=lroa", "should be 'full', 'none', 'lora' or 'dora', got 'lroa'"),
        ("gate.enabled=1", "should be a valid boolean, got 1"),
        ("gate.enabled=off", "should be a valid boolean, got 'off'"),
        ("gate.lam=true", "should be a valid number, got True"),
        ("gate.lam=-1", "should be greater than or equal to 0, got -1"),
        ("train.lr=abc", "should be a valid number, got 'abc'"),
        ("train.lr=.inf", "should be a finite number, got inf"),
        ("train.lr=.nan", "should be a finite number, got nan"),
        ("train.zero_stage=4", "should be less than or equal to 3, got 4"),
        ("train.zero_stage=true", "should be a valid integer, got True"),
        ("train.betas=[0.9]", "train.betas[1]: is missing, got [0.9]"),
        ("train.betas=[0.9, 0.9, 0.9]", "should have 2 entries, got [0.9, 0.9, 0.9]"),
        ("data.crop_scale=0.5", "should be a list, as in data.crop_scale=[0.9,1.0], got 0.5"),
        ("eval.datasets=pets", "should be a list, as in eval.datasets=[pets], got 'pets'"),
        ("model.name=''", "should not be empty, got ''"),
        ("name=42", "should be a valid string, got 42; put it in quotes"),
        ("name=a/b", "have only a-z, A-Z, 0-9 and . _ + = , @ -, got 'a/b'"),
        ("adapter.towers=[image, sound]", "should be 'image', 'text' or 'pool', got 'sound'"),
        ("adapter.towers=[]", "should not be empty, got []"),
        ("adapter.towers=image", "a list of image, text, pool, as in adapter.towers=[image,text], got 'image'"),
        ("data.max_bad_share=1.5", "should be less than or equal to 1, got 1.5"),
    ],
)
def test_wrong_value_is_reported_with_option_value_and_origin(write, typed, told):
    (message,) = faults(write(MINIMAL), typed)
    assert message.startswith(typed.partition("=")[0])
    assert told in message
    assert message.endswith("(command line)")


def test_all_faults_come_in_one_message(write):
    path = write(
        """
adapter: {rank: x, kind: lroa}
train:
  lr: 0
  learning_rate: 3
  global_batch_size: 100
"""
    )
    told = faults(path, "adapter.rnak=4", "bad", "gate.init=0.01", "eval=3", "data.templates=[3, ok]")
    starts = [message.split(":")[0].split(" ")[0] for message in told]
    assert sorted(starts) == sorted(
        [
            "bad",
            "train.learning_rate",
            "adapter.rnak",
            "eval",
            "adapter.kind",
            "adapter.rank",
            "train.lr",
            "data.train",
            "data.templates[0]",
            "train.global_batch_size",
            "gate.init",
        ]
    )
    assert any(message.endswith("(c.yaml:2)") for message in told)
    assert any(message.startswith("data.train: is required") for message in told)


def test_conflicts_are_reported_with_wrong_values(write):
    """Rules between sound values are reported alongside a wrong value."""
    told = faults(write(MINIMAL), "train.global_batch_size=100", "seed=-1")
    assert len(told) == 2
    assert any("100 should be a multiple of data.streams (64)" in message for message in told)


def test_no_rule_is_told_about_a_value_that_is_itself_wrong(write):
    (message,) = faults(write(MINIMAL), "data.streams=0")
    assert message.startswith("data.streams: should be greater than or equal to 1")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["train.global_batch_size=100"], "train.global_batch_size: 100 should be a multiple of data.streams (64)"),
        (["gate.init=0.05"], "every gate would start closed"),
        (["gate.settle_steps=9", "gate.settle_margin=0.1"], "0.1 should be below gate.threshold (0.1)"),
        (["adapter.kind=none", "train.train_rest=none"], "trains nothing"),
        (["adapter.towers=[image, image]"], "adapter.towers: image, image names a value twice"),
        (["train.compile=true", "train.zero_stage=3", "train.micro_batch_size=4"], "would reduce gradients twice"),
        (["train.betas=[0.9, 1.0]"], "should be in 0 <= beta < 1"),
        (["data.crop_scale=[0.9, 0.5]"], "should be 0 < low <= high <= 1"),
        (["data.templates=[a photo]"], "'a photo' has no {c} for the class name"),
    ],
)
def test_conflicts_between_options(write, typed, told):
    (message,) = faults(write(MINIMAL), *typed)
    assert told in message


def test_rules_hold_for_a_config_built_in_code():
    with pytest.raises(ValidationError, match="should be a multiple"):
        Config.model_validate({"data": {"train": "x"}, "train": {"global_batch_size": 100}})


def test_gates_conflict_only_if_there_are_gates(write):
    path = write(MINIMAL)
    for change in ("gate.enabled=false", "adapter.kind=full", "adapter.random_k=8"):
        config = load_config(path, [change, "gate.init=0.0"])
        assert not config.gated
    assert load_config(path).gated


def test_origin_of_every_value(write):
    write("base: ../root.yaml\ntrain:\n  lr: 1e-4\n  epochs: 3\n", "sub/mid.yaml")
    write("train:\n  lr: 1\n  eps: 1e-6\ndata:\n  train: here\n", "root.yaml")
    path = write("base: sub/mid.yaml\ntrain: {epochs: 5}\n", "top.yaml")
    config, origin = load_config_with_origin(path, ["adapter={rank: 4, kind: dora}", "adapter.rank=8"])
    assert (config.train.lr, config.train.eps, config.train.epochs) == (1e-4, 1e-6, 5.0)
    assert (config.adapter.rank, config.adapter.kind) == (8, "dora")
    assert origin["train.lr"] == "sub/mid.yaml:3"
    assert origin["train.eps"] == "root.yaml:3"
    assert origin["train.epochs"] == "top.yaml:2"
    assert origin["adapter.rank"] == origin["adapter.kind"] == "command line"
    assert origin["train.betas"] == "default"
    assert list(origin) == list(describe()) == list(flatten(config))


def test_yaml_and_overrides_round_trip(write):
    config = load_config(
        write(MINIMAL),
        ["train.lr=3e-7", "name='1e-5'", "model.pretrained='off'", "data.templates=['a {c}: # 1', '{c}']", "seed=7"],
    )
    assert config.name == "1e-5"
    assert load_config(write(to_yaml(config), "again.yaml")) == config
    assert override(config, {}) == config
    by_flatten = [f"{key}={'null' if value is None else value}" for key, value in flatten(config).items()]
    by_flatten = [text for text in by_flatten if not text.startswith(("name=", "model.pretrained="))]
    assert load_config(write(MINIMAL), [*by_flatten, "name='1e-5'", "model.pretrained='off'"]) == config


def test_override_checks_like_load_and_makes_a_copy(write):
    """Override checks like load and leaves the old config alone."""
    config = load_config(write(MINIMAL))
    assert override(config, {"adapter.rank": 4, "gate.lam": 0.5}).adapter.rank == 4
    assert config.adapter.rank == 16
    with pytest.raises(ConfigError, match=r"did you mean adapter.rank"):
        override(config, {"adapter.rnak": 4})
    with pytest.raises(ConfigError, match="multiple of data.streams"):
        override(config, {"data.streams": 3})


def test_config_is_frozen_all_the_way_down():
    config = Config.model_validate(
        {"data": {"train": "x", "templates": ["a {c}"]}, "adapter": {"targets": ["image.*"]}}
    )
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0
    assert isinstance(hash(config), int)  # hashable: no list hides anywhere


def test_digest_ignores_name_place_and_tracking_and_nothing_else():
    config = Config.model_validate({"data": {"train": "x"}})
    same = override(config, {"name": "b", "out": "elsewhere", "tracking.enabled": False, "tracking.uri": "http://x"})
    assert digest(same) == digest(config)
    assert (
        len({digest(config), digest(override(config, {"seed": 1})), digest(override(config, {"gate.lam": 2.0}))}) == 3
    )
    assert len(digest(config)) == 12


def test_every_option_has_a_one_line_description():
    for key, text in describe().items():
        assert text, key
        assert "\n" not in text
