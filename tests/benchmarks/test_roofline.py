"""What a step keeps and how long it computes, on shapes: the plan's formula, and the table of docs/scaling.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from roofline import Step, kept_bytes, of_all_layers, seconds, table

from pipeline.costs.scale import SHAPES

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_a_step_keeps_what_the_plan_says() -> None:
    """A batch of 512 pairs is held to 40 GB."""
    kept = of_all_layers(kept_bytes, Step())
    assert kept < 40e9
    assert SHAPES["ViT-B-16"].with_captions().activation_bytes(512, 1, 2) == pytest.approx(kept, rel=0.15)


@pytest.mark.slow
def test_short_texts_and_quickgelu_save_a_quarter() -> None:
    before = Step(whole_texts=True, stock_gelu=True)
    assert of_all_layers(kept_bytes, Step()) < 0.75 * of_all_layers(kept_bytes, before)
    assert seconds(Step(), compiled=True) < seconds(Step()) < seconds(before)


@pytest.mark.slow
def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [row for row in table(512) if row not in page]
    assert not missing, "python tests/benchmarks/roofline.py, into pipeline/costs/scale_page.py"
