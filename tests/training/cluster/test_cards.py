"""A rank finds its own card, and no run lands on a CPU by mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline.config import Config, ConfigError, override
from pipeline.training.cluster import cards
from pipeline.training.cluster.cards import card_as_local_rank, choose_device, hidden_cards, own_cards
from pipeline.training.cluster.distributed import read_world
from pipeline.training.settings import compiles


@pytest.fixture
def no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without cards; files put into the folder stand for some."""
    monkeypatch.setattr(cards, "_NODES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    return tmp_path


def with_cards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("visible", "local_rank", "card"), [(8, 3, 3), (1, 3, 0), (2, 3, 1)])
def test_a_rank_takes_its_own_card(visible: int, local_rank: int, card: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the launcher shows each task its own card alone, as srun --gpus-per-task=1 does."""
    with_cards(monkeypatch, visible)
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": str(local_rank)}
    assert read_world(env).device == torch.device("cuda", card)
    assert read_world(env, "cpu").device.type == "cpu"


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_deepspeed_gets_the_number_of_the_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets the device by the local rank; afterwards the variable is the launcher's again."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv(name, "3")
    with card_as_local_rank(torch.device("cuda", 0)):
        assert os.environ[name] == "0"
    assert os.environ[name] == "3"
    with card_as_local_rank(torch.device("cpu")):
        assert os.environ[name] == "3"


def test_a_host_without_cards_trains_on_the_cpu(no_card: Path) -> None:
    (no_card / "nvidiactl").touch()  # the driver's own, and no card
    assert choose_device(0) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device=cuda: .* has no NVIDIA card .* set train\.device=cpu"):
        choose_device(0, "cuda")


def test_cards_that_torch_cannot_use_are_an_error(no_card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver too old for the build of torch would else make every rank train on the CPU."""
    for number in range(2):
        (no_card / f"nvidia{number}").touch()

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError) as refused:
        choose_device(0)
    text = str(refused.value)
    assert "cannot use its 2 NVIDIA cards (The NVIDIA driver on your system is too old (found version 11040))" in text
    assert "\n" not in text
    assert choose_device(0, "cpu") == torch.device("cpu")


@pytest.mark.parametrize("mask", ["", "-1", "NoDevFiles"])
def test_hidden_cards_stay_hidden(mask: str, no_card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_card / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert choose_device(0) == torch.device("cpu")
    assert hidden_cards()
    assert own_cards() == 1
    with pytest.raises(ConfigError, match="hides every card"):
        choose_device(0, "cuda")


@pytest.mark.parametrize(
    ("device", "world", "changes", "expected", "why"),
    [
        ("cpu", 1, {}, False, "CPU"),
        ("cuda", 8, {}, True, "64 images per rank"),
        ("cuda", 1, {}, False, "512 images per rank keep a GPU busy"),
        ("cuda", 8, {"train.compile": False}, False, ""),
        ("cpu", 1, {"train.compile": True}, True, ""),
        ("cuda", 8, {"train.zero_stage": 3, "train.micro_batch_size": 16}, False, "zero_stage=3"),
    ],
)
def test_layers_are_compiled_where_a_card_has_few_images(
    device: str, world: int, changes: dict, expected: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.settings._missing_to_compile", str)
    config = override(Config.model_validate({"data": {"train": "x"}}), changes)
    found, said = compiles(config, world, device)
    assert found is expected
    assert why in said
    assert bool(said) == (config.train.compile == "auto")


def test_without_a_compiler_layers_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = Config.model_validate({"data": {"train": "x"}})
    assert compiles(config, 8, "cuda") == (
        False,
        "a C compiler (gcc) is missing, and 64 images per rank would be faster with it",
    )
