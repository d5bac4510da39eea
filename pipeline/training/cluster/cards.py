"""The device that a rank trains on, and why it is a CPU if a card was expected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from pipeline.config import ConfigError

Device = Literal["auto", "cuda", "cpu"]

# One file for each NVIDIA card of this machine or container.
_NODES = Path("/dev")
_MASK = "CUDA_VISIBLE_DEVICES"


def choose_device(local_rank: int, wanted: Device = "auto") -> torch.device:
    """A card for this rank, or the CPU.

    Args:
        local_rank: number of this process among those of its host.
        wanted: auto takes a card if there is one.

    Returns:
        The card with the number of the local rank, or number 0 if the launcher shows each process only its own card.

    Raises:
        ConfigError: `wanted` is cuda and there is no card, or the host has cards that torch cannot use.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    host, cards = os.uname().nodename, own_cards()
    if wanted == "auto" and (not cards or hidden_cards()):
        return torch.device("cpu")
    if hidden_cards():
        why = f"{_MASK}={os.environ[_MASK]} hides every card"
    elif cards:
        why = f"torch {torch.__version__} cannot use its {cards} NVIDIA cards ({_torch_fault()})"
    else:
        why = "it has no NVIDIA card that this process may open"
    raise ConfigError(f"train.device={wanted}: {host}: {why}; mend that, or set train.device=cpu to train on the CPU")


@contextmanager
def card_as_local_rank(device: torch.device) -> Iterator[None]:
    """Make DeepSpeed use this rank's card: it takes the local rank's number even if a rank sees only one card."""
    names = [name for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK") if name in os.environ]
    before = {name: os.environ[name] for name in names}
    if device.type == "cuda":
        os.environ |= dict.fromkeys(names, str(device.index))
    try:
        yield
    finally:
        os.environ |= before


def own_cards() -> int:
    """Number of NVIDIA cards that this process may open, whether or not torch can use them."""
    return sum(_opens(node) for node in _NODES.glob("nvidia[0-9]*"))


def hidden_cards() -> bool:
    """Whether the environment hides every card from this process."""
    return os.environ.get(_MASK, "0").strip() in ("", "-1", "NoDevFiles")


def _opens(node: Path) -> bool:
    try:
        os.close(os.open(node, os.O_RDWR))
    except OSError:
        return False
    return True


def _torch_fault() -> str:
    """Why torch has no CUDA, in torch's own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return "it sees none of them"
