"""An eager step launches no more kernels than PEFT's, whatever the number of layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kernels import step_kernels


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_step_launches_no_more_kernels_than_pefts(kind: str) -> None:
    own, peft = (step_kernels(kind, who, layers=2) for who in ("selora", "PEFT"))
    assert 0 < own.total() <= peft.total(), (own, peft)


def test_keep_without_a_reference_batch_adds_nothing() -> None:
    plain, keeping = (step_kernels("lora", "selora", layers=1, keep=keep) for keep in (False, True))
    assert keeping.total() <= 1.1 * plain.total()
