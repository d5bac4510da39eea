"""Training shards by many processes: the same bytes however they come about, kept over kill -9."""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.originals.imagenet import wnids
from pipeline.data.originals.train import list_imagenet_train
from pipeline.data.shards import parallel_pack
from pipeline.data.shards.index import ShardIndex, load_index
from pipeline.data.shards.parallel_pack import Packing, pack_in_parallel
from pipeline.data.shards.verify import verify
from pipeline.data.sources.sample import Sample
from pipeline.data.storage.tar import TarIndex

IMAGES = 1030
CLASSES = [f"class {number}" for number in range(1000)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., Image.Image]) -> Path:
    """1,030 JPEGs in the wnid folders of train/."""
    root = tmp_path_factory.mktemp("imagenet")
    photo(0, 16, 12).save(root / "one.jpg", quality=90)
    data = (root / "one.jpg").read_bytes()
    for number in range(IMAGES):
        wnid = wnids()[number % 1000]
        folder = root / "train" / wnid
        folder.mkdir(parents=True, exist_ok=True)
        # A comment makes each file another one.
        comment = b"\xff\xfe\x00\x0a%08d" % number
        (folder / f"{wnid}_{number}.JPEG").write_bytes(data[:2] + comment + data[2:])
    return root


@pytest.fixture
def packing(imagenet: Path, tmp_path: Path) -> Callable[..., Packing]:
    def make(out: str = "out", samples_per_shard: int = 200, **options: Any) -> Packing:
        listing = list_imagenet_train(imagenet, IMAGES)
        return Packing(listing, tmp_path / out, CLASSES, samples_per_shard=samples_per_shard, **options)

    return make


def pack(packing: Packing, workers: int = 2, **options: Any) -> ShardIndex:
    index = pack_in_parallel(packing, workers=workers, **options)
    assert index is not None
    return index


def assert_same(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_parallel_shards_hold_every_image_once(imagenet: Path, packing: Callable[..., Packing]) -> None:
    """Shards hold every image once with its label and its bytes."""
    seen = []
    index = pack(packing(), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(1, 7)]
    found = {}
    for shard in index.shards:
        tar = TarIndex(index.directory / shard.name)
        for number, sample in enumerate(tar.samples):
            found[sample.key] = (tar.read(number, "jpg"), int(tar.read(number, "cls")))
        # Class folders come sorted, and yet no shard is a run of classes.
        assert len({sample.key[:9] for sample in tar.samples}) > 25
    place = {wnid: label for label, wnid in enumerate(wnids())}
    assert found == {
        f"{file.parent.name}/{file.stem}": (file.read_bytes(), place[file.parent.name])
        for file in (imagenet / "train").glob("*/*.JPEG")
    }
    assert (index.samples, index.classes, index.sizes()) == (IMAGES, tuple(CLASSES), [200] * 5 + [30])
    assert verify(index.directory).ok
    assert sorted(path.name for path in index.directory.iterdir()) == [
        "index.json",
        *(f"shard-{number:05d}.tar" for number in range(6)),
    ]


def test_parts_of_a_job_give_the_bytes_of_one_process(packing: Callable[..., Packing]) -> None:
    """Parts of a cluster job give the same bytes as one process."""
    whole = pack(packing("whole"), workers=1)
    assert pack_in_parallel(packing(), part=(2, 3), workers=1) is None
    with pytest.raises(ConfigError, match="--force: would remove what the other parts have written"):
        pack_in_parallel(packing(), part=(1, 3), force=True)
    assert pack_in_parallel(packing(), part=(3, 3)) is None
    # What is left may be shared out anew.
    assert pack_in_parallel(packing(), part=(2, 2)) is None
    index = pack_in_parallel(packing(), part=(1, 2))
    assert index is not None
    assert index == load_index(packing().out)
    assert index.digest == whole.digest
    assert_same(whole.directory, packing().out)
    assert pack_in_parallel(packing(), part=(2, 3)) == index


def test_simultaneous_parts_make_one_folder(packing: Callable[..., Packing]) -> None:
    """Parts that begin and end at the same moment make one folder."""
    whole = pack(packing("whole"), workers=1)
    context = multiprocessing.get_context("fork")
    for out in ("first", "second"):
        starting = context.Barrier(6)

        def run(part: int, out: str = out, starting=starting) -> None:
            job = packing(out)
            starting.wait()
            pack_in_parallel(job, part=(part, 6), workers=1)

        parts = [context.Process(target=run, args=(number,)) for number in range(1, 7)]
        for process in parts:
            process.start()
        for process in parts:
            process.join()
        assert [process.exitcode for process in parts] == [0] * 6
        assert_same(whole.directory, packing(out).out)


@pytest.fixture
def packing_that_stops(packing: Callable[..., Packing], tmp_path: Path) -> Iterator[Callable[..., BaseProcess]]:
    """start(name, shard=0) -> a process that packs all, stops in the middle of a shard till `NAME.go` is there."""
    started: list[BaseProcess] = []

    def run(name: str, shard: int) -> None:
        job, members = packing(), parallel_pack.sample_members
        middle = job.samples(shard)[20].key

        def stop_in_the_middle(sample: Sample) -> dict[str, bytes]:
            if sample.key == middle:
                (tmp_path / f"{name}.stands").touch()
                wait_for(tmp_path / f"{name}.go")
            return members(sample)

        parallel_pack.sample_members = stop_in_the_middle
        pack_in_parallel(job, workers=1)

    def start(name: str, shard: int = 0) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=run, args=(name, shard))
        process.start()
        started.append(process)
        wait_for(tmp_path / f"{name}.stands")
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert file.exists()


def test_two_jobs_writing_one_shard_make_one_folder(
    packing: Callable[..., Packing], packing_that_stops: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    """Two jobs that write the same shard at the same moment make one folder."""
    whole = pack(packing("whole"), workers=1)
    both = [packing_that_stops(name) for name in ("one", "two")]  # both are in the middle of the first shard
    assert len(list(packing().out.glob("shard-00000.tar.*.part"))) == 2
    for name in ("one", "two"):
        (tmp_path / f"{name}.go").touch()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert_same(whole.directory, packing().out)


def test_overtaken_and_killed_jobs_leave_nothing(
    packing: Callable[..., Packing], packing_that_stops: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    """A job that others have overtaken ends well and one that was killed leaves nothing."""
    whole = pack(packing("whole"), workers=1)
    slow, victim = packing_that_stops("slow", 3), packing_that_stops("victim", 4)
    victim.kill()
    victim.join()
    assert list(packing().out.glob("shard-00004.tar.*.part"))
    pack(packing())
    assert_same(whole.directory, packing().out)
    (tmp_path / "slow.go").touch()
    slow.join()
    assert slow.exitcode == 0
    assert_same(whole.directory, packing().out)


def test_parts_that_claim_the_folder_at_once_all_get_it(packing: Callable[..., Packing]) -> None:
    """Six threads that change places at nearly every instruction: without care a third of the rounds fail."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for number in range(60):
                starting = threading.Barrier(6)

                def claim(job: Packing, starting: threading.Barrier = starting) -> ShardIndex | None:
                    starting.wait()
                    return parallel_pack._claim(job, force=False, alone=False)

                assert list(pool.map(claim, [packing(f"out{number}")] * 6)) == [None] * 6
    finally:
        sys.setswitchinterval(interval)


def test_finished_shards_survive_kill_9(imagenet: Path, packing: Callable[..., Packing]) -> None:
    """After kill -9 finished shards are kept and the rest is packed."""
    whole = pack(packing("whole"))
    cut = packing()
    # The packing stands still at an image in the fifth shard, for reading a pipe waits for a writer.
    stuck = imagenet / "train" / cut.samples(4)[100].name
    data = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)
    try:
        child = multiprocessing.get_context("fork").Process(target=pack_in_parallel, args=(cut,), kwargs={"workers": 2})
        child.start()
        records = cut.out / "parts"
        deadline = time.monotonic() + 120
        while len(list(records.glob("*.json"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = children_of(child.pid or 0)
        assert workers
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    finally:
        stuck.unlink()
        stuck.write_bytes(data)
    kept = {path: path.stat().st_ino for path in cut.out.glob("*.tar")}
    assert len(kept) == 5
    assert not (cut.out / "index.json").exists()
    with pytest.raises(ConfigError, match="no index.json in it"):
        load_index(cut.out)
    # One of the finished shards was spoilt meanwhile: it has its size and not its content.
    spoilt = cut.out / "shard-00001.tar"
    content = bytearray(spoilt.read_bytes())
    content[5000] ^= 1
    spoilt.write_bytes(content)
    pack(packing())
    assert_same(whole.directory, cut.out)
    assert {path for path, inode in kept.items() if path.stat().st_ino != inode} == {spoilt}
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_packing_twice_does_nothing_unless_options_differ(packing: Callable[..., Packing]) -> None:
    """The same command again does nothing and another is refused."""
    index = pack(packing())
    before = {path.name: path.stat().st_mtime_ns for path in index.directory.iterdir()}
    assert pack(packing()) == index
    assert {path.name: path.stat().st_mtime_ns for path in index.directory.iterdir()} == before
    with pytest.raises(ConfigError, match="not empty; give --force"):
        pack(packing(seed=1))
    again = pack(packing(seed=1), force=True)
    assert again.digest != index.digest
    begun = packing("begun")
    assert pack_in_parallel(begun, part=(1, 6)) is None
    with pytest.raises(
        ConfigError, match=r"unfinished packing of other files or settings \(1030 images in 6 shards, here"
    ):
        pack(packing("begun", samples_per_shard=100))


def test_an_unreadable_image_is_named_and_mending_it_continues(imagenet: Path, packing: Callable[..., Packing]) -> None:
    bad = imagenet / "train" / packing().samples(3)[0].name
    data = bad.read_bytes()
    bad.write_bytes(data[:200])
    try:
        with pytest.raises(ConfigError, match=rf"{bad.name}: cannot be decoded .*nothing may be left out"):
            pack(packing(), workers=1)
    finally:
        bad.write_bytes(data)
    assert [path.name for path in sorted(packing().out.glob("*.tar"))][:3] == [f"shard-0000{n}.tar" for n in range(3)]
    assert verify(pack(packing()).directory).ok


def test_wrong_counts_are_refused_before_anything_is_written(imagenet: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"images: 1030 found, 1281167 expected\n.*\nlikely: an interrupted download"):
        list_imagenet_train(imagenet)
    with pytest.raises(ConfigError, match="no folder n01440764 in it or in train/\nit must hold the 1000 wnid folders"):
        list_imagenet_train(tmp_path)
    (tmp_path / "n01440764.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="n01440764.tar is there, so unpack each class tar"):
        list_imagenet_train(tmp_path)
    (tmp_path / "n01440764").mkdir()
    with pytest.raises(ConfigError, match="classes: 0 found, 1000 expected; the smallest is n01440764 with 0"):
        list_imagenet_train(tmp_path, 0)


def test_a_damaged_record_is_named(packing: Callable[..., Packing]) -> None:
    begun = packing()
    pack_in_parallel(begun, part=(1, 6))
    record = begun.out / "parts/shard-00000.json"
    record.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ConfigError, match=r"shard-00000.json: damaged \(.*remove it"):
        pack_in_parallel(begun, part=(2, 6))
