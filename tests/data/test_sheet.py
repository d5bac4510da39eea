"""The contact sheet of sources and of shards."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.data.shards.index import pack


def test_a_sheet_shows_images_under_their_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        folder = tmp_path / "in" / ("red_<b>", "blue")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), ((255, 0, 0), (0, 0, 255))[number % 2]).save(folder / f"{number}.png")
    (tmp_path / "in/blue/1.png").write_bytes(b"broken")
    page = tmp_path / "sheet.html"
    assert main(["inspect", str(tmp_path / "in"), "--sheet", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"{page}: 8 images\n")
    text = page.read_text()
    blue, red = text.split("<h2>")[1:]
    assert blue.startswith("0: blue, 6 images") and red.startswith("1: red &lt;b&gt; (folder red_&lt;b&gt;), 6 images")
    assert "left out: not an image" in blue and "http" not in text
    for part, colour in ((blue, (0, 0, 254)), (red, (254, 0, 0))):
        for data in re.findall(r"base64,([^\"]+)", part):
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            assert (image.size, image.getpixel((112, 112))) == ((224, 224), colour)

    pack(tmp_path / "in", tmp_path / "shards", max_unreadable=0.5)
    assert main(["inspect", str(tmp_path / "shards"), "--sheet", str(page)]) == 0
    assert "<h2>0: blue, 5 images" in page.read_text()
    assert main(["inspect", str(tmp_path / "in"), "--sheet", str(tmp_path / "no/where.html")]) == 2


def test_a_sheet_of_captions_shows_them_as_text(tmp_path: Path, photo: Callable[..., Image.Image]) -> None:
    for number in range(3):
        photo(number).save(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.txt").write_text(f"sight & sound {number}\nzwei\n")
    assert main(["inspect", str(tmp_path), "--sheet", str(tmp_path / "sheet.html")]) == 0
    assert "sight &amp; sound 2<br>zwei" in (tmp_path / "sheet.html").read_text()
