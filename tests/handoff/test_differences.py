"""Every export of the demo's CLIP and of a ViT, read by its library: the table of docs/exports.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.handoff.export import export
from pipeline.handoff.graphs import GraphOptions

ROOT = Path(__file__).parents[2]
ROWS = {
    "open_clip": ("open_clip", "fp32"),
    "hf": ("hf", "fp32"),
    "peft": ("peft", "fp32"),
    "timm": ("timm", "fp32"),
    "onnx": ("onnx", "fp32"),
    "onnx --fp16": ("onnx", "fp16"),
    "onnx of a ViT": ("onnx", "fp32"),
    "triton": ("triton", "fp32"),
}


def table() -> dict[str, tuple[float, float]]:
    """Of the page: export -> the largest difference and what is allowed."""
    text = (ROOT / "docs/exports.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([-0-9.e]+) \| ([-0-9.e]+) \|$", text, flags=re.MULTILINE)
    return {name: (float(found), float(allowed)) for name, found, allowed in rows}


def test_the_page_has_a_row_for_every_export() -> None:
    assert list(table()) == list(ROWS)
    assert all(found < allowed for found, allowed in table().values())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_differences_are_those_of_the_page(
    row: str,
    make_run: Callable[..., Path],
    make_vit_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another machine rounds in another way, so ten times the page's figure is still the same."""
    to, precision = ROWS[row]
    vit = row in ("timm", "onnx of a ViT")
    run = make_vit_run(tmp_path / "run", ("a", "b", "c"), steps=(5,)) if vit else make_run("lora", True)
    report = export(run, to, tmp_path / "out", graph=lambda _: GraphOptions(precision=precision))  # pyright: ignore[reportArgumentType]
    assert report.difference is not None
    with capsys.disabled():
        print(f"\n| {row} | {report.verified_by} | {report.difference:.1e} | {report.tolerance:.1e} |")
    found, allowed = table()[row]
    assert report.difference <= max(10 * found, 1e-5)
    assert report.tolerance == pytest.approx(allowed, rel=0.2)
