"""The cache's limit holds while several processes write: fetched files, decoded images, and both."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from pipeline.data.eval.batches import EvalBatch, eval_loader
from pipeline.data.eval.decoded_cache import open_pixels
from pipeline.data.eval.wds_layout import EvalSet, write_wds_eval
from pipeline.data.sources.formats import read_source
from pipeline.data.storage import cache_budget as room
from pipeline.data.storage import remote
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.remote import local_copy

FORK = multiprocessing.get_context("fork")
SIZE = 2**20
CHUNK = 2**18
# What one fetched file of SIZE is promised.
PROMISED = room.on_disk(SIZE // room.PAGE)
CFG = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Five URLs and what is behind them."""
    found = {}
    for number in range(5):
        path = tmp_path / f"file-{number}"
        path.write_bytes(random.Random(number).randbytes(SIZE))
        found[path.as_uri()] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def clothes(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """53 JPEGs."""
    source = read_source(class_folders)
    out = tmp_path_factory.mktemp("set") / "clothes"
    return write_wds_eval(source.samples, out, classnames=source.classes, templates=["{c}"])


def disk_use(cache: Cache) -> int:
    """In blocks, at one moment: while space is counted no process may start or remove an entry."""
    (cache.directory / "locks").mkdir(parents=True, exist_ok=True)
    held = {}
    with FileLock(cache.directory / "locks" / "room.lock"):
        for file in (cache.directory / "files").glob("*/*"):
            with suppress(FileNotFoundError):
                held[file.stat().st_ino] = 512 * file.stat().st_blocks
    return sum(held.values())


@contextmanager
def watched(cache: Cache) -> Iterator[list[int]]:
    """The disk use, again and again until the block ends."""
    seen: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            seen.append(disk_use(cache))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


class Writers:
    """Processes that fetch, each of which stops in the middle of its file until `gate` is there, and tells by files."""

    def __init__(self, cache: Cache, folder: Path) -> None:
        self.cache, self.folder, self.gate = cache, folder, folder / "gate"
        self.processes: list[BaseProcess] = []
        folder.mkdir()

    def start(self, url: str) -> BaseProcess:
        process = FORK.Process(target=self._fetch, args=(url,))
        process.start()
        self.processes.append(process)
        return process

    def _fetch(self, url: str) -> None:
        read = remote.read_bytes

        def read_up_to_the_gate(url: str, attempts: int, span: tuple[int, int] | None = None) -> bytes:
            if span == (CHUNK, 2 * CHUNK):
                self._tell("fetches")
                while not self.gate.exists():
                    time.sleep(0.01)
            return read(url, attempts, span)

        told = logging.Handler()
        told.emit = lambda record: self._tell("waits" if "waits for other fetches" in record.getMessage() else "over")
        logging.getLogger("selora.data").addHandler(told)
        remote.CHUNK, remote.read_bytes = CHUNK, read_up_to_the_gate
        local_copy(url, self.cache, size=SIZE)

    def _tell(self, word: str) -> None:
        (self.folder / f"{os.getpid()}.{word}").touch()

    def wait_for(self, **told: int) -> None:
        """Wait until the writers have reported this much in all, which must be exact."""
        deadline = time.monotonic() + 60
        while sum(self.told().values()) < sum(told.values()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.told() == {"fetches": 0, "waits": 0, "over": 0} | told

    def told(self) -> dict[str, int]:
        return {word: len(list(self.folder.glob(f"*.{word}"))) for word in ("fetches", "waits", "over")}

    def join(self) -> list[int | None]:
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Callable[[int], Writers]]:
    made: list[Writers] = []

    def make(max_bytes: int) -> Writers:
        made.append(Writers(Cache(tmp_path / "cache", max_bytes), tmp_path / "told"))
        return made[-1]

    yield make
    for each in made:
        for process in each.processes:
            process.kill()
            process.join()


def test_five_fetches_at_once_stay_under_the_bound(files: dict[str, bytes], writers: Callable[[int], Writers]) -> None:
    """Five fetches at once of which two fit stay under the bound."""
    five = writers(int(2.5 * PROMISED))
    with watched(five.cache) as seen:
        for url in files:
            five.start(url)
        five.wait_for(fetches=2, waits=3)
        five.gate.touch()
        assert five.join() == [0] * 5
    assert PROMISED < max(seen) <= five.cache.max_bytes
    for url, content in files.items():
        assert local_copy(url, five.cache, size=SIZE).read_bytes() == content
    assert list((five.cache.directory / "promised").iterdir()) == []


def test_kill_9_gives_the_room_of_a_fetch_back(files: dict[str, bytes], writers: Callable[[int], Writers]) -> None:
    two = writers(int(1.5 * PROMISED))
    (first, _), (second, content) = list(files.items())[:2]
    victim = two.start(first)
    two.wait_for(fetches=1)
    two.start(second)
    two.wait_for(fetches=1, waits=1)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    two.wait_for(fetches=2, waits=1)
    two.gate.touch()
    assert two.join() == [-signal.SIGKILL, 0]
    assert local_copy(second, two.cache, size=SIZE).read_bytes() == content
    assert SIZE <= disk_use(two.cache) <= two.cache.max_bytes


def test_a_long_waiting_fetch_exceeds_the_bound_by_one_file(
    files: dict[str, bytes], writers: Callable[[int], Writers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch that has waited long goes over the bound by its one file and the run says so."""
    monkeypatch.setattr(room, "WAIT_S", 0.5)
    two = writers(int(1.5 * PROMISED))
    first, second = list(files)[:2]
    two.start(first)
    two.wait_for(fetches=1)
    two.start(second)
    two.wait_for(fetches=2, waits=1, over=1)
    two.gate.touch()
    assert two.join() == [0, 0]


def batches(found: EvalSet, cache: Cache | None, workers: int = 0, **options) -> Iterator[EvalBatch]:
    return iter(eval_loader(found, CFG, batch_size=8, pixels=cache, workers=workers, **options))


def pixels_of(found: Iterator[EvalBatch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in found])


def takes(found: EvalSet, cache: Cache) -> int:
    """What decoding all images of a set is promised."""
    return open_pixels(cache, "any", "any", (32, 32), []).takes(range(len(found)))


def test_a_set_is_kept_once_another_decoder_is_gone(clothes: EvalSet, tmp_path: Path) -> None:
    """A set is not kept while another process decodes into the room and is after kill -9."""
    cache = Cache(tmp_path / "cache", 10**9)
    cache = replace(cache, max_bytes=int(1.5 * takes(clothes, cache)))
    begun = tmp_path / "begun"

    def decode_a_little() -> None:
        found = batches(clothes, cache)
        next(found)
        begun.touch()
        time.sleep(600)

    other = FORK.Process(target=decode_a_little)
    other.start()
    try:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        # The same set is an entry of its own with another border, and the same entry with the same one.
        plain = pixels_of(batches(clothes, None, border=1))
        with watched(cache) as seen:
            made = list(batches(clothes, cache, border=1))
        assert torch.equal(pixels_of(iter(made)), plain)
        assert "SELORA_CACHE_GB allows 0.0002" in made[0].trouble
        assert "with all that is just being written" in made[0].trouble
        assert not any(batch.trouble for batch in batches(clothes, cache, workers=2))
    finally:
        other.kill()
        other.join()
    with watched(cache) as more:
        made = list(batches(clothes, cache, border=1, workers=2))
    assert not any(batch.trouble for batch in made)
    assert torch.equal(pixels_of(iter(made)), plain)
    assert max([*seen, *more, disk_use(cache)]) <= cache.max_bytes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fetch_counts_images_that_are_being_decoded(
    clothes: EvalSet, files: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    """A fetch takes the room of images that are just being decoded."""
    cache = Cache(tmp_path / "cache", PROMISED + room.PAGE)
    plain = pixels_of(batches(clothes, None))
    decoding = batches(clothes, cache, workers=workers)
    made = [next(decoding)]
    (url, content), *_ = files.items()
    assert local_copy(url, cache, size=SIZE).read_bytes() == content
    made += decoding
    assert torch.equal(pixels_of(iter(made)), plain)
    assert made[0].trouble == ""
    # Workers may have read ahead to the end by then.
    assert workers or "their space was used for fetched files" in made[-1].trouble
    assert SIZE <= disk_use(cache) <= cache.max_bytes
    # The other way round the file leaves for the images, for nobody fetches it any more.
    again = list(batches(clothes, cache))
    assert not any(batch.trouble for batch in again)
    assert disk_use(cache) < SIZE
