"""Vectors of images and texts: equal for any ranks and interruptions, and searched."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cli import main
from pipeline.config import ConfigError
from pipeline.data.images import decode, eval_resize, normalize
from pipeline.data.shards.foreign import read_shards
from pipeline.data.sources.sample import SourceOptions
from pipeline.demo.assets import MODEL, asset, unpack
from pipeline.model.clip import load_clip
from pipeline.vectors import embed as module
from pipeline.vectors.embed import embed
from pipeline.vectors.embedder import Embedder, load_embedder
from pipeline.vectors.items import Item, images_of, texts_of
from pipeline.vectors.search import search
from pipeline.vectors.store import read_vectors


@pytest.fixture(scope="module")
def model() -> str:
    return str(asset(MODEL))


@pytest.fixture(scope="module")
def embedder(model: str) -> Embedder:
    return load_embedder(model)


@pytest.fixture
def photos(image_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Ten images in two folders, and one that is none."""
    folder = image_folder(classes=2, each=5, seed=4)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_vectors_are_those_of_the_model_in_both_formats(
    photos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", model, str(photos), str(tmp_path / "a.parquet"), "--batch-size", "4"]) == 1
    assert "broken.jpg: not an image" in capsys.readouterr().err
    assert main(["embed", model, str(photos), str(tmp_path / "a.npy"), "--batch-size", "4"]) == 1
    one, other = read_vectors(tmp_path / "a.parquet"), read_vectors(tmp_path / "a.npy")
    assert torch.equal(one.vectors, other.vectors) and list(one.keys) == list(other.keys)
    assert len(one.keys) == 10 and not (tmp_path / "a.npy.parts").exists()
    clip: Any = load_clip(f"local-dir:{model}")
    cfg = clip.preprocess_cfg
    for key, vector in zip(one.keys, np.load(tmp_path / "a.npy"), strict=True):
        pixels = eval_resize(decode((photos / key).read_bytes(), form="reference"), cfg)[None]
        with torch.no_grad():
            wanted = clip.model.eval().encode_image(normalize(pixels, cfg["mean"], cfg["std"]))[0]
        assert torch.allclose(torch.from_numpy(vector), wanted / wanted.norm(), atol=1e-5)


def test_a_stopped_embedding_is_continued_to_the_same_file(
    photos: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = images_of(str(photos), SourceOptions())
    embed(embedder, items, "images", tmp_path / "whole.npy", batch_size=3)
    real, saved = module._save, []

    def stopping(folder: Path, part: int, *rest: Any) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(part)
        real(folder, part, *rest)

    monkeypatch.setattr(module, "_save", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(embedder, items, "images", tmp_path / "cut.npy", batch_size=3)
    assert not (tmp_path / "cut.npy").exists()
    with pytest.raises(ConfigError, match="another model or another --batch-size"):
        embed(embedder, items, "images", tmp_path / "cut.npy", batch_size=4)
    done: list[int] = []
    monkeypatch.setattr(module, "_save", lambda folder, part, *rest: (done.append(part), real(folder, part, *rest)))
    embed(embedder, items, "images", tmp_path / "cut.npy", batch_size=3)
    assert sorted(done) == [2, 3]
    for suffix in (".npy", ".json"):
        assert (tmp_path / f"cut{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        embed(embedder, items, "images", tmp_path / "cut.npy", batch_size=3)


def test_search_finds_the_same_image_and_the_same_text_first(
    photos: Path, model: str, embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.parquet"
    embed(embedder, images_of(str(photos), SourceOptions()), "images", file)
    found = read_vectors(file)
    for key in found.keys[:3]:
        assert search(found, embedder, str(photos / key), 2)[0] == pytest.approx((key, 1.0), abs=1e-5)
    assert main(["search", str(file), "a red shoe", "--top", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = (found.vectors @ embedder.texts(["a red shoe"])[0]).sort(descending=True).values[:3]
    assert [row["cosine"] for row in rows] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert main(["search", str(file), str(tmp_path / "gone.jpg")]) == 2
    assert "there is no such image" in capsys.readouterr().err


def test_texts_come_from_lines_columns_and_standard_input(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "a.csv").write_text("id,Caption\n1,a cat\n2,a dog\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat\na dog\n"))
    texts = [Item("a cat", "a cat"), Item("a dog", "a dog")]
    for source in (str(tmp_path / "a.txt"), str(tmp_path / "a.csv"), "-"):
        assert texts_of(source, SourceOptions()) == texts
    with pytest.raises(ConfigError, match="no column words; name one of id, Caption"):
        texts_of(str(tmp_path / "a.csv"), SourceOptions(caption_column="words"))
    embed(embedder, texts, "texts", tmp_path / "t.npy")
    assert torch.allclose(read_vectors(tmp_path / "t.npy").vectors, embedder.texts(["a cat", "a dog"]))


def test_vectors_of_another_model_are_not_compared(embedder: Embedder, tmp_path: Path) -> None:
    embed(embedder, [Item("a", "a"), Item("b", "b")], "texts", tmp_path / "t.npy")
    facts = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(facts | {"digest": "f" * 64}))
    with pytest.raises(ConfigError, match="computed with ffffffffffff"):
        search(read_vectors(tmp_path / "t.npy"), embedder, "a")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a file of vectors"):
        read_vectors(tmp_path / "t.npy")


@pytest.mark.slow
def test_ranks_and_a_kill_leave_the_same_file(model: str, tmp_path: Path) -> None:
    """One rank from start to end, two ranks, and one rank that is killed after three parts and started again."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for sample in read_shards(unpack(tmp_path / "data", "clothing_train.tar.gz") / "clothing_train").samples[:400]:
        (photos / f"{sample.key.replace('/', '-')}{sample.image.suffix}").write_bytes(sample.image.read_bytes())
    more = ["--batch-size", "8"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    for ranks in ("1", "2"):
        run = [*command, ranks, "-m", "pipeline", "embed", model, str(photos), str(tmp_path / f"{ranks}.npy"), *more]
        subprocess.run(run, env=settings, check=True, timeout=280)
    alone = [sys.executable, "-m", "pipeline", "embed", model, str(photos), str(tmp_path / "killed.npy"), *more]
    first = subprocess.Popen(alone, env=settings)
    parts = tmp_path / "killed.npy.parts"
    until = time.monotonic() + 200
    while len(list(parts.glob("*.safetensors"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    first.kill()
    first.wait()
    left = len(list(parts.glob("*.safetensors")))
    assert 3 <= left < 50 and not (tmp_path / "killed.npy").exists()
    subprocess.run(alone, env=settings, check=True, timeout=280)
    for name in ("2", "killed"):
        for suffix in (".npy", ".json"):
            assert (tmp_path / f"{name}{suffix}").read_bytes() == (tmp_path / f"1{suffix}").read_bytes(), name
