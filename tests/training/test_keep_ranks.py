"""With reference samples: the gradient of the whole batch on any number of ranks, under every stage."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import keep_rank
from keep_rank import WAYS


def results(fork_server: Any, world: int, folder: str, cases: list[tuple[Any, ...]], out: Path) -> list[dict]:
    out.mkdir()
    port = free_port()
    ranks = [
        fork_server.Process(target=keep_rank.main, args=(rank, world, port, folder, cases, out))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(500)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return [torch.load(out / f"{number}.pt") for number in range(len(cases))]


def check(found: dict[str, Tensor], exact: dict[str, Tensor], what: object) -> None:
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{what} {n}: {m}")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_on_ranks_are_those_of_one(fork_server, small_clip, tmp_path, world: int) -> None:
    (exact,) = results(fork_server, 1, small_clip, [("lora", 0, "fp32", "whole")], tmp_path / "1")
    assert {"loss/keep", "loss/replay", "loss/drift_image", "loss/drift_text"} <= exact.keys()
    (found,) = results(fork_server, world, small_clip, [("lora", 2, "fp32", "whole")], tmp_path / f"{world}")
    check(found, exact, f"{world} ranks")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_kind_and_way_gives_one_gradient(fork_server, small_clip, tmp_path, world: int) -> None:
    kinds = ("lora", "dora", "full")
    for kind, positives in product(kinds, ("whole", "class")):
        ways = ["class"] if positives == "class" else [way for way in WAYS if way != "class"]
        cases = [(kind, stage, "fp32", way) for stage, way in product((0, 1, 2, 3), ways)]

        name = f"{kind}-{positives}"
        (exact,) = results(fork_server, 1, small_clip, [(kind, 0, "fp32", positives)], tmp_path / f"exact-{name}")
        found = results(fork_server, world, small_clip, cases, tmp_path / name)
        for case, each in zip(cases, found, strict=True):
            check(each, exact, case)
