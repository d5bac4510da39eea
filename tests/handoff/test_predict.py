"""`selora predict` on files of which some cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.handoff import predict as module


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two good images around one that is text, one of floats and one that is not there; a model that names colours."""

    def answer(model: object, columns: dict[str, list[bytes]], **params: Any) -> list[dict[str, Any]]:
        return [{"label": "red", "score": 1.0, "labels": ["red"], "scores": [1.0]} for _ in columns["image"]]

    monkeypatch.setattr(module, "load_registered", lambda *_: None)
    monkeypatch.setattr(module, "predict", answer)
    for name in ("a.png", "z.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "text.jpg").write_text("<html>")
    Image.new("F", (8, 8)).save(tmp_path / "floats.tif")
    return [str(tmp_path / name) for name in ("a.png", "text.jpg", "floats.tif", "gone.png", "z.png")]


def test_good_files_are_answered_and_bad_ones_named(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "models:/m@champion", *files]) == 1
    said = capsys.readouterr()
    assert said.out == f"{files[0]}: red 1.000\n{files[4]}: red 1.000\n"
    assert said.err == (
        f"selora predict: {files[1]}: not an image\n"
        f"selora predict: {files[2]}: floating point pixels have no agreed range; save it with 8 or 16 bit\n"
        f"selora predict: {files[3]}: No such file or directory\n"
    )


def test_json_has_a_line_for_each_file(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "models:/m@champion", *files, "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == files
    assert [line.get("label") or line["error"] for line in lines][:2] == ["red", "not an image"]


def test_nothing_but_bad_files_is_a_mistake(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "models:/m@champion", *files[1:4]]) == 2
    said = capsys.readouterr()
    assert said.out == "" and all(f"{file}: " in said.err for file in files[1:4])
    assert main(["predict", "models:/m@champion", files[0]]) == 0
