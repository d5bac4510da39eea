"""Shards and evaluation sets behind a URL: fetched once, resumed, checked, within a size limit, with a flaky server."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
from http_servers import QuietHandler, serving

from pipeline.config import ConfigError
from pipeline.data.eval.batches import eval_loader
from pipeline.data.eval.wds_layout import EvalSet, open_eval_set, write_wds_eval
from pipeline.data.shards.index import ShardIndex, load_index, open_shard
from pipeline.data.shards.verify import verify
from pipeline.data.sources.formats import read_source
from pipeline.data.storage import remote
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.remote import local_copy, remote_place
from pipeline.data.train.stream import TrainDataset, train_loader

CFG = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}
LARGE = 9_000_000  # two chunks


@dataclass
class Server:
    """A web server over ``root`` that answers ranges and fails on demand. ``requests``: (method, path, first byte)."""

    root: Path
    url: str = ""
    errors: float = 0.0
    ranges: bool = True
    status: int = 503
    requests: list[tuple[str, str, int | None]] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    before_answer: Callable[[str, int | None], None] = lambda path, start: None

    def gets(self, path: str) -> list[int | None]:
        return [start for method, requested, start in self.requests if method == "GET" and requested == path]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    served = Server(tmp_path / "served")
    served.root.mkdir()
    with serving(_handler(served)) as address:
        served.url = f"http://{address}"
        yield served


def _handler(served: Server) -> type[QuietHandler]:
    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            said = self.headers.get("Range") if served.ranges else None
            start = int(said.removeprefix("bytes=").partition("-")[0]) if said else None
            served.requests.append((self.command, self.path, start))
            served.before_answer(self.path, start)
            file = served.root / self.path.lstrip("/")
            if served.draw.random() < served.errors:
                self.head(served.status, 0)
            elif not file.is_file():
                self.head(404, 0)
            else:
                self.send(file, said, start, body)

        def send(self, file: Path, said: str | None, start: int | None, body: bool) -> None:
            data = file.read_bytes()
            if said is not None:
                data = data[start : int(said.rpartition("-")[2]) + 1]
            self.head(200 if start is None else 206, len(data), {"ETag": hashlib.md5(file.read_bytes()).hexdigest()})
            if body:
                # One answer in twenty also breaks off in the middle.
                cut = len(data) // 2 if served.draw.random() < served.errors else len(data)
                self.wfile.write(data[:cut])
                self.close_connection = cut < len(data)

        def head(self, status: int, length: int, more: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **(more or {})}.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**9, attempts=5)


@pytest.fixture(scope="module")
def local_set(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> EvalSet:
    source = read_source(class_folders)
    out = tmp_path_factory.mktemp("eval") / "clothes"
    return write_wds_eval(source.samples, out, classnames=source.classes, templates=["{c}"], samples_per_shard=20)


def put(server: Server, name: str, size: int = LARGE) -> bytes:
    data = random.Random(name).randbytes(size)
    (server.root / name).write_bytes(data)
    return data


def files_of(cache: Cache) -> list[str]:
    return sorted(path.name for path in (cache.directory / "files").glob("*/*"))


def test_a_set_is_equal_from_a_folder_urls_and_the_hub(
    local_set: EvalSet, server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set is the same from a folder from urls and from the hub."""
    folder = local_set.tars[0].path.parent.parent
    base = server.root / "datasets/clip-benchmark/wds_clothes"
    for kind, other in (("raw/main", "*.tar"), ("resolve/main", "*.txt")):
        shutil.copytree(folder, base / kind, ignore=shutil.ignore_patterns(other))
    shutil.copytree(folder, server.root / "plain")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/clothes", recursive=True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    locations = (
        f"file://{folder}",
        "memory://bucket/clothes",
        f"{server.url}/plain/",
        "hf:clip-benchmark/wds_clothes",
        "hf:clip-benchmark/wds_clothes@main",
        f"{server.url}/datasets/clip-benchmark/wds_clothes",
    )
    expected = [batch.images for batch in eval_loader(local_set, CFG, batch_size=20, workers=0)]
    for location in locations:
        found = open_eval_set(location, cache=cache)
        assert (found.digest, found.labels) == (local_set.digest, local_set.labels)
        pixels = [batch.images for batch in eval_loader(found, CFG, batch_size=20, workers=0)]
        assert all((one == other).all() for one, other in zip(pixels, expected, strict=True))
    memory.rm("/bucket", recursive=True)
    # The three spellings of the hub are one place, so its tars were fetched once.
    assert len(server.gets("/datasets/clip-benchmark/wds_clothes/resolve/main/test/0.tar")) == 1
    assert {path.rpartition("/")[2] for _, path, _ in server.requests if "/raw/" in path} == {
        "classnames.txt",
        "zeroshot_classification_templates.txt",
        "dataset_type.txt",
        "nshards.txt",
    }


def test_the_public_hub_is_where_its_datasets_lie() -> None:
    place = remote_place("hf:clip-benchmark/wds_vtab-cifar10")
    assert place.name == "wds_vtab-cifar10"
    assert place.texts == "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10/raw/main"
    assert place.files == "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10/resolve/main"
    assert remote_place("https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10") == place
    other = remote_place("https://elsewhere.org/datasets/a/b")
    assert other.texts == other.files == "https://elsewhere.org/datasets/a/b"


def test_five_percent_of_broken_answers_change_nothing(server: Server, cache: Cache) -> None:
    """A twentieth of errors and broken answers changes nothing."""
    server.errors = 0.05
    for number in range(12):
        data = put(server, f"{number}.tar", 300_000)
        assert local_copy(f"{server.url}/{number}.tar", cache).read_bytes() == data
    assert len(server.requests) > 2 * 12


def test_a_fetch_is_resumed_at_the_byte_where_it_broke_off(server: Server, cache: Cache) -> None:
    data = put(server, "a.tar")
    wanted = hashlib.sha256(data).hexdigest()

    def fail_late(_path: str, start: int | None) -> None:
        server.errors = 1.0 if start else 0.0

    server.before_answer = fail_late
    few = Cache(cache.directory, cache.max_bytes, attempts=2)
    with pytest.raises(ConfigError, match=rf"{server.url}/a.tar: failed 2 times.*503.*the same command continues"):
        local_copy(f"{server.url}/a.tar", few, size=LARGE, sha256=wanted)
    assert files_of(cache) == ["a.tar.part"]
    server.before_answer, server.errors = lambda path, start: None, 0.0
    server.requests.clear()
    assert local_copy(f"{server.url}/a.tar", cache, size=LARGE, sha256=wanted).read_bytes() == data
    assert server.gets("/a.tar") == [remote.CHUNK]
    local_copy(f"{server.url}/a.tar", cache, size=LARGE, sha256=wanted)
    assert len(server.requests) == 1


def test_a_killed_fetch_is_continued_by_the_next_process(server: Server, cache: Cache) -> None:
    data = put(server, "a.tar")
    gate = threading.Event()
    server.before_answer = lambda path, start: None if not start else (gate.wait(60), None)[1]
    child = multiprocessing.get_context("fork").Process(target=local_copy, args=(f"{server.url}/a.tar", cache))
    child.start()
    deadline = time.monotonic() + 60
    while remote.CHUNK not in server.gets("/a.tar") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    gate.set()
    server.requests.clear()
    assert local_copy(f"{server.url}/a.tar", cache).read_bytes() == data
    assert server.gets("/a.tar") == [remote.CHUNK]


def test_processes_and_threads_that_want_one_file_fetch_it_once(server: Server, cache: Cache) -> None:
    data = put(server, "a.tar", 100_000)
    server.before_answer = lambda path, start: time.sleep(0.2)
    url = f"{server.url}/a.tar"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=local_copy, args=(url, cache)) for _ in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: local_copy(url, cache), range(3)))
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert [path.read_bytes() for path in paths] == [data]
    assert len(server.gets("/a.tar")) == 1


def test_the_least_recently_used_leave_first(server: Server, tmp_path: Path) -> None:
    """The oldest used leave first and what is open stays readable."""
    cache = Cache(tmp_path / "cache", 350_000)
    for name in "abc":
        put(server, name, 100_000)
        os.utime(local_copy(f"{server.url}/{name}", cache), (ord(name), ord(name)))
    held = local_copy(f"{server.url}/b", cache).open("rb")
    os.utime(held.name, (1, 1))
    local_copy(f"{server.url}/a", cache)
    data = put(server, "d", 100_000)
    assert local_copy(f"{server.url}/d", cache).read_bytes() == data
    assert files_of(cache) == ["a", "c", "d"]
    assert len(held.read()) == 100_000
    held.close()
    put(server, "big", 400_000)
    with pytest.raises(ConfigError, match=r"/big: 400000 bytes are more than the whole cache.*SELORA_CACHE_GB"):
        local_copy(f"{server.url}/big", cache)


def _read_at_random(cache: Cache, files: dict[str, bytes], seed: int, reads: int) -> None:
    draw = random.Random(seed)
    for _ in range(reads):
        url = draw.choice(sorted(files))
        for _attempt in range(50):
            with contextlib.suppress(FileNotFoundError):  # pushed out before it was opened
                content = local_copy(url, cache, size=len(files[url])).read_bytes()
                assert content == files[url]
                break
        else:
            os._exit(2)


def test_a_tight_cache_holds_its_bound_under_killed_readers(tmp_path: Path) -> None:
    """A tight cache holds its bound under many readers of whom some are killed."""
    files = {}
    for number in range(8):
        path = tmp_path / f"file-{number}"
        path.write_bytes(random.Random(number).randbytes(20_000 + 1000 * number))
        files[path.as_uri()] = path.read_bytes()
    tight = Cache(tmp_path / "cache", 3 * 28_000)
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    # The first three would read until somebody ends them.
    readers = [
        context.Process(target=_read_at_random, args=(tight, files, seed, 120 if seed >= 3 else 10**9))
        for seed in range(6)
    ]
    for reader in readers:
        reader.start()
    for victim in readers[:3]:
        time.sleep(draw.uniform(0.05, 0.2))
        os.kill(victim.pid or 0, signal.SIGKILL)
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [-signal.SIGKILL] * 3 + [0] * 3
    for url, content in files.items():
        assert local_copy(url, tight, size=len(content)).read_bytes() == content
    held = sum(path.stat().st_size for path in (tight.directory / "files").glob("*/*"))
    assert 28_000 <= held <= tight.max_bytes


def test_a_changed_file_is_fetched_anew(server: Server, cache: Cache) -> None:
    first = put(server, "a.tar", 1000)
    assert local_copy(f"{server.url}/a.tar", cache).read_bytes() == first
    (server.root / "a.tar").write_bytes(first[::-1])
    assert local_copy(f"{server.url}/a.tar", cache).read_bytes() == first[::-1]


def test_a_server_without_ranges_is_read_all_the_same(server: Server, cache: Cache) -> None:
    server.ranges = False
    data = put(server, "a.tar")
    assert local_copy(f"{server.url}/a.tar", cache).read_bytes() == data


def test_wrong_content_and_refusals_name_the_url_and_the_way_out(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, "a.tar", 1000)
    with pytest.raises(ConfigError, match=rf"{server.url}/a.tar: its content is not what its index says"):
        local_copy(f"{server.url}/a.tar", cache, size=1000, sha256="0" * 64)
    assert files_of(cache) == []
    with pytest.raises(ConfigError, match=rf"{server.url}/none.tar: no such file; look for"):
        local_copy(f"{server.url}/none.tar", cache)
    server.errors, server.status = 1.0, 403
    with pytest.raises(ConfigError, match=r"/a.tar: access refused .*credentials are taken from HF_TOKEN"):
        local_copy(f"{server.url}/a.tar", cache)
    with pytest.raises(ConfigError, match=r"gs://bucket/a.tar: reading it needs another package .*selora\[gcs\]"):
        local_copy("gs://bucket/a.tar", cache)
    with pytest.raises(ConfigError, match=r"nonsense://a: cannot be read .*nonsense"):
        local_copy("nonsense://a", cache)
    blocked = server.root / "file"
    blocked.write_text("")
    fsspec.filesystem("memory").pipe("/x", b"x")
    with pytest.raises(ConfigError, match=r"memory://x: cannot be kept in .*name a place with SELORA_CACHE"):
        local_copy("memory://x", Cache(blocked, 100))
    monkeypatch.setenv("SELORA_CACHE_GB", "many")
    with pytest.raises(ConfigError, match="SELORA_CACHE_GB: should be a number of gigabytes above 0, got 'many'"):
        open_eval_set(f"{server.url}/x")


def test_batches_are_equal_from_a_faulty_url_and_tight_cache(
    shards: ShardIndex, server: Server, tmp_path: Path
) -> None:
    """Training batches are the same from a url with errors and a tight cache."""
    shutil.copytree(shards.directory, server.root / "train")
    server.errors = 0.05
    # Room for two of the five shards: most reads find theirs pushed out.
    tight = Cache(tmp_path / "cache", int(2.5 * max(shard.bytes for shard in shards.shards)), attempts=6)
    far = load_index(f"{server.url}/train", tight)
    assert (far.digest, far.sizes()) == (shards.digest, shards.sizes())

    def batches(index: ShardIndex, workers: int) -> list[tuple[list[str], int]]:
        dataset = TrainDataset(index, size=16, seed=0, streams=4, window=8)
        loader = train_loader(dataset, global_batch=8, start_step=0, stop_step=10, workers=workers)
        return [(batch.keys, int(batch.images.sum())) for batch in loader]

    expected = batches(shards, 0)
    assert batches(far, 0) == expected
    assert batches(far, 2) == expected
    held = sum(path.stat().st_size for path in (tight.directory / "files").glob("*/*"))
    assert held <= tight.max_bytes


def test_an_evicted_copy_is_fetched_again_when_read(shards: ShardIndex, server: Server, cache: Cache) -> None:
    """A copy that was pushed out is fetched again when it is read."""
    shutil.copytree(shards.directory, server.root / "train")
    tar = open_shard(load_index(f"{server.url}/train", cache), 0)
    tar.close()
    shutil.rmtree(cache.directory)
    assert tar.read(0, "jpg") == open_shard(shards, 0).read(0, "jpg")
    with pytest.raises(ConfigError, match=rf"{server.url}/train: verify reads a directory"):
        verify(f"{server.url}/train")
    (server.root / "train/shard-00001.tar").write_bytes(b"x" * shards.shards[1].bytes)
    with pytest.raises(ConfigError, match=r"train/shard-00001.tar: its content is not what its index says"):
        open_shard(load_index(f"{server.url}/train", cache), 1)
    (server.root / "train/index.json").unlink()
    with pytest.raises(ConfigError, match=rf"{server.url}/train: no index.json in it"):
        load_index(f"{server.url}/train", cache)
