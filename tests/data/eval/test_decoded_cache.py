"""Kept evaluation images: the same pixels with and without them, whatever happens to writers and disk."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.eval import batches as eval_batches
from pipeline.data.eval.batches import EvalBatch, eval_loader
from pipeline.data.eval.wds_layout import EvalSet, open_eval_set, write_wds_eval
from pipeline.data.shards.index import ShardIndex
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import Sample
from pipeline.data.storage.cache import Cache
from pipeline.data.train.stream import TrainDataset, train_loader

CFG = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}
IMAGE = 3 * 32 * 32
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def clothes(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """53 JPEGs."""
    source = read_source(class_folders)
    return write_wds_eval(
        source.samples, tmp_path_factory.mktemp("set") / "clothes", classnames=source.classes, templates=["{c}"]
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**9)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each image that this process decodes."""
    seen: list[int] = []
    decode = eval_batches.decode
    monkeypatch.setattr(eval_batches, "decode", lambda *a, **k: (seen.append(1), decode(*a, **k))[1])
    return seen


def batches(found: EvalSet, cache: Cache | None, **options) -> list[EvalBatch]:
    given = {"cfg": CFG, "batch_size": 8, "workers": 0, "pixels": cache} | options
    return list(eval_loader(found, **given))


def pixels(found: EvalSet, cache: Cache | None, **options) -> Tensor:
    made = batches(found, cache, **options)
    assert not any(batch.trouble for batch in made)
    return torch.cat([batch.images for batch in made])


def entries(cache: Cache) -> list[Path]:
    return sorted((cache.directory / "files").glob("*/*.pixels"))


def held(cache: Cache) -> int:
    return sum(512 * file.stat().st_blocks for file in (cache.directory / "files").glob("*/*"))


def test_pixels_are_the_same_and_decoded_once(clothes: EvalSet, cache: Cache, decoded: list[int]) -> None:
    ways = [
        {},
        {"preprocessing": "fast"},
        {"border": 2},
        {"cfg": CFG | {"interpolation": "bilinear"}},
        {"cfg": CFG | {"resize_mode": "longest", "fill_color": 7}},
        {"cfg": CFG | {"size": (24, 32)}},
    ]
    plain = [pixels(clothes, None, **way) for way in ways]
    decoded.clear()
    first = [pixels(clothes, cache, **way) for way in ways]
    assert len(decoded) == len(ways) * len(clothes)
    decoded.clear()
    again = [pixels(clothes, cache, **way, batch_size=5) for way in ways]
    assert decoded == []
    for expected, one, two in zip(plain, first, again, strict=True):
        assert torch.equal(expected, one)
        assert torch.equal(expected, two)
    assert len(entries(cache)) == len(ways)  # each way is an entry of its own


def test_parts_of_a_set_fill_one_entry(clothes: EvalSet, cache: Cache, decoded: list[int]) -> None:
    plain = pixels(clothes, None)
    some = [3, 4, 40]
    assert torch.equal(pixels(clothes, cache, only=some), plain[some])
    parts = [pixels(clothes, cache, rank=rank, world=2, workers=2) for rank in range(2)]
    assert torch.equal(torch.cat(parts), plain)
    decoded.clear()
    assert torch.equal(pixels(clothes, cache, limit=20), pixels(clothes, None, limit=20))
    assert len(decoded) == 20  # those without a cache
    assert len(entries(cache)) == 1


def test_a_set_made_anew_with_equal_sizes_is_another_one(tmp_path: Path, cache: Cache) -> None:
    sets = []
    for name, value in (("a", 10), ("b", 200)):
        file = tmp_path / f"{name}.png"
        Image.new("RGB", (40, 40), (value, value, value)).save(file, compress_level=0)
        sample = Sample("x", "x", file, 0, ())
        sets.append(write_wds_eval([sample], tmp_path / name / "set", classnames=["c"], templates=["{c}"]))
    assert [sample.members for sample in sets[0].tars[0].samples] == [s.members for s in sets[1].tars[0].samples]
    assert [int(pixels(each, cache).unique()) for each in sets] == [10, 200]


def test_a_bad_image_is_named_with_a_cache_too(tmp_path: Path, clothes: EvalSet, cache: Cache) -> None:
    good = (tmp_path / "good.jpg", tmp_path / "bad.jpg")
    Image.new("RGB", (40, 40)).save(good[0])
    good[1].write_bytes(good[0].read_bytes())
    samples = [Sample(file.stem, file.stem, file, 0, ()) for file in good]
    made = write_wds_eval(samples, tmp_path / "set", classnames=["c"], templates=["{c}"])
    tar, member = made.tars[0], made.tars[0].samples[1].members["jpg"]
    with tar.path.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"no image")
    with pytest.raises(ConfigError, match="s0000001: not an image"):
        batches(open_eval_set(tmp_path / "set"), cache)


def test_two_writers_at_once(clothes: EvalSet, cache: Cache, decoded: list[int]) -> None:
    plain = pixels(clothes, None)
    answers = FORK.Queue()

    def write(batch_size: int) -> None:
        found = pixels(clothes, cache, batch_size=batch_size, workers=2)
        answers.put(torch.equal(found, plain))

    writers = [FORK.Process(target=write, args=(size,)) for size in (3, 4)]
    for writer in writers:
        writer.start()
    assert [answers.get(timeout=60) for _ in writers] == [True, True]
    for writer in writers:
        writer.join()
    decoded.clear()
    assert torch.equal(pixels(clothes, cache), plain)
    assert decoded == []


def test_a_killed_writer_leaves_whole_images_or_none(
    clothes: EvalSet, cache: Cache, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pixels(clothes, None)
    begun = FORK.Queue()

    def write() -> None:
        write_at = os.pwrite

        def slowly(file: int, data: object, at: int) -> int:
            half = memoryview(data).cast("B")  # type: ignore[arg-type]
            write_at(file, half[: len(half) // 2], at)
            begun.put(1)
            time.sleep(0.02)
            return write_at(file, data, at)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "pwrite", slowly)
        pixels(clothes, cache)

    writer = FORK.Process(target=write)
    writer.start()
    for _ in range(21):  # in the middle of the eleventh image
        begun.get(timeout=60)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    decoded.clear()
    assert torch.equal(pixels(clothes, cache), plain)
    assert len(clothes) - 12 <= len(decoded) < len(clothes)


def test_a_page_that_the_disk_lost_is_noticed(clothes: EvalSet, cache: Cache, decoded: list[int]) -> None:
    plain = pixels(clothes, cache)
    with entries(cache)[0].open("r+b") as file:
        file.seek(7 * IMAGE + 100)
        file.write(bytes(500))
    decoded.clear()
    assert torch.equal(pixels(clothes, cache), plain)
    assert torch.equal(pixels(clothes, cache), plain)
    assert len(decoded) == 1  # and it was mended


def test_what_was_used_longest_ago_leaves_and_the_bound_holds(clothes: EvalSet, tmp_path: Path) -> None:
    tight = Cache(tmp_path / "cache", int(2.8 * len(clothes) * IMAGE))
    for number, border in enumerate((0, 1)):
        pixels(clothes, tight, border=border)
        newest = max(entries(tight), key=lambda file: file.stat().st_mtime)
        for file in newest.parent.iterdir():
            os.utime(file, (number + 1, number + 1))
    first, second = sorted(entries(tight), key=lambda file: file.stat().st_mtime)
    pixels(clothes, tight)  # used now
    pixels(clothes, tight, border=2)
    assert first in entries(tight)
    assert second not in entries(tight)
    assert held(tight) <= tight.max_bytes
    small = Cache(tmp_path / "small", 1000)
    made = batches(clothes, small)
    assert torch.equal(torch.cat([batch.images for batch in made]), pixels(clothes, None))
    assert "need 0.000163 GB, SELORA_CACHE_GB allows 1e-06" in made[0].trouble
    assert entries(small) == []


@pytest.fixture
def small_disk(make_disk: Callable[[str], Path]) -> Path:
    """On a file system of 128 kB: the 53 images need 163 kB."""
    return make_disk("128k")


def test_a_full_disk_changes_nothing_but_a_line(
    clothes: EvalSet, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cache = pixels(clothes, None), Cache(small_disk / "cache", 10**9)
    foreseen = batches(clothes, cache)
    assert torch.equal(torch.cat([batch.images for batch in foreseen]), plain)
    assert "need 0.000163 GB, and no more than half of the free" in foreseen[0].trouble
    # Another program takes what was free when we looked.
    monkeypatch.setattr("pipeline.data.eval.decoded_cache.FREE_SHARE", 10.0)
    for workers in (0, 2):
        shutil.rmtree(cache.directory)
        made = batches(clothes, cache, workers=workers)
        assert torch.equal(torch.cat([batch.images for batch in made]), plain)
        assert {batch.trouble for batch in made} == {
            "",
            f"decoded images are not kept in {cache.directory}: No space left on device; results are the same without",
        }


def test_an_unwritable_cache_only_costs_a_line(clothes: EvalSet, tmp_path: Path) -> None:
    """A place that cannot be written changes nothing but a line."""
    (tmp_path / "file").write_text("")
    made = batches(clothes, Cache(tmp_path / "file", 10**9))
    assert torch.equal(torch.cat([batch.images for batch in made]), pixels(clothes, None))
    assert f"not kept in {tmp_path / 'file'}: Not a directory" in made[0].trouble


def test_a_user_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELORA_CACHE", str(tmp_path / "node"))
    monkeypatch.setenv("SELORA_CACHE_GB", "3")
    assert Cache.named("off") is None
    assert Cache.named(None) == Cache(tmp_path / "node", 3 * 10**9)
    assert Cache.named(str(tmp_path / "here")) == Cache(tmp_path / "here", 3 * 10**9)


def test_training_crops_are_not_kept(shards: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELORA_CACHE", str(tmp_path / "node"))
    dataset = TrainDataset(shards, size=16, seed=0, streams=4, window=8)
    assert len(list(train_loader(dataset, global_batch=8, start_step=0, stop_step=3, workers=0))) == 3
    assert not (tmp_path / "node").exists()
