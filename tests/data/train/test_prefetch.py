"""Shards are fetched before they are needed: in the stream's order, once per node, and without any other effect."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faulty_s3
import pytest

from pipeline.config import ConfigError
from pipeline.data.order import Order, rank_positions
from pipeline.data.shards.index import ShardIndex, load_index
from pipeline.data.storage.cache import Cache
from pipeline.data.train.prefetch import Turns, first_needs, room_ahead
from pipeline.data.train.stream import Batch, TrainDataset, train_loader

ROOT = Path(__file__).parents[3]
SAMPLES, PER_SHARD, BATCH = 96, 8, 4
STEPS = 2 * SAMPLES // BATCH  # two epochs


@pytest.fixture
def store(store: faulty_s3.FaultyStore) -> faulty_s3.FaultyStore:
    """Without faults, until a test asks for some."""
    store.errors = store.slow = 0.0
    return store


@pytest.fixture
def near(shards_of: Callable[..., ShardIndex], photo: Callable, encode: Callable[..., bytes]) -> ShardIndex:
    images = [encode(photo(seed), "JPEG") for seed in range(16)]
    members = [{"jpg": images[number % 16], "cls": b"0"} for number in range(SAMPLES)]
    return shards_of(members, per_shard=PER_SHARD)


@pytest.fixture
def far(near: ShardIndex, store: faulty_s3.FaultyStore, tmp_path: Path) -> Iterator[ShardIndex]:
    """The same shards in the store, which goes when nobody reads from it any more."""
    shutil.copytree(near.directory, store.root / "bucket" / "train")
    index = load_index("s3://bucket/train", Cache(tmp_path / "cache", 10**9, attempts=2))
    store.served.clear()
    yield index
    gc.collect()
    wait_for(lambda: not readers())


def loader(index: ShardIndex, *, streams: int = 1, window: int = 4, workers: int = 0, **options: Any):
    data = TrainDataset(index, size=16, seed=0, streams=streams, window=window)
    steps: dict[str, Any] = {"start_step": 0, "stop_step": STEPS}
    return train_loader(data, global_batch=BATCH, workers=workers, **steps | options)


def shards_in_order(index: ShardIndex) -> list[str]:
    """The paths at which one stream of BATCH samples a step asks for its shards in its first epoch."""
    order = Order(index.sizes(), seed=0, streams=1, window=4)
    numbers = dict.fromkeys(order.locate(position).shard for position in range(SAMPLES))
    return [f"/bucket/train/{index.shards[number].name}" for number in numbers]


def wait_for(true: Callable[[], bool]) -> None:
    """However long it takes; what never comes fails."""
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "selora-read-ahead"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_allowed_number_of_shards_is_prefetched(
    far: ShardIndex, store: faulty_s3.FaultyStore, workers: int
) -> None:
    """The next shards are asked for while the first is used and never more than allowed."""
    expected = shards_in_order(far)
    asked: list[str] = []
    begun, most = 1, 0

    def note(path: str) -> None:
        nonlocal most
        asked.append(path)
        # Two steps use a shard up, so the steps begun so far touch (begun + 1) // 2 of them.
        most = max(most, len(set(asked)) - (begun + 1) // 2)

    store.asked = note
    stream = iter(loader(far, workers=workers, ahead=3, **({"prefetch": 1} if workers else {})))
    assert next(stream).step == 0
    # Nobody asks for another batch: what comes now comes ahead. A worker makes one batch more by itself.
    wait_for(lambda: len(asked) == 4)
    assert asked == expected[:4]
    for step in range(1, STEPS):
        begun = step + 1
        assert next(stream).step == step
    # Once each over two epochs; whoever needs a shard may overtake the thread on a busy machine.
    assert sorted(asked) == sorted(expected)
    if not workers:
        assert most == 3
    with pytest.raises(StopIteration):
        next(stream)
    wait_for(lambda: not readers())


def test_without_prefetch_a_shard_is_fetched_when_needed(far: ShardIndex, store: faulty_s3.FaultyStore) -> None:
    """Without read_ahead a shard is fetched when it is needed."""
    for step, _ in enumerate(loader(far, ahead=0, stop_step=SAMPLES // BATCH)):
        assert len(store.served) == step // 2 + 1
        assert not readers()


def rows(batch: Batch) -> tuple[list[str], list[str], int]:
    return batch.keys, batch.captions, int(batch.images.sum())


def test_a_node_fetches_each_shard_once(near: ShardIndex, far: ShardIndex, store: faulty_s3.FaultyStore) -> None:
    """Ranks and workers of a node fetch each shard once and see what they would see from the disk."""
    store.slow = 0.3

    def ranks(index: ShardIndex, ahead: int, workers: int) -> list[tuple[Batch, Batch]]:
        two = [
            loader(
                index, streams=4, window=12, workers=workers, ahead=ahead, rank=rank, world=2, sharing=2, start_step=5
            )
            for rank in range(2)
        ]
        return list(zip(*two, strict=True))

    expected = [(rows(one), rows(other)) for one, other in ranks(near, 0, 0)]
    assert len(expected) == STEPS - 5
    found = ranks(far, 2, 2)
    assert [(rows(one), rows(other)) for one, other in found] == expected
    assert store.served == Counter({f"/bucket/train/{shard.name}": 1 for shard in far.shards})
    assert not any(batch.retries for pair in found for batch in pair)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_missing_shard_ends_the_run_where_it_is_needed(
    far: ShardIndex, store: faulty_s3.FaultyStore, ahead: int, workers: int
) -> None:
    """A shard that cannot be fetched ends the run where it is needed and in the same words."""
    lost = shards_in_order(far)[3]
    store.asked = lambda path: "503" if path == lost else None
    steps: list[int] = []
    told = rf"^s3:/{lost}: failed \d times, last with \w+: .*; the received part is kept, so the same command continues"
    with pytest.raises(ConfigError, match=told):
        steps.extend(batch.step for batch in loader(far, ahead=ahead, workers=workers))
    # All that the three shards before it hold was made.
    assert steps == [0, 1, 2, 3, 4, 5]


def test_a_store_that_comes_back_costs_only_a_retry(
    near: ShardIndex, far: ShardIndex, store: faulty_s3.FaultyStore
) -> None:
    """A store that fails ahead of the need and comes back costs a counted retry and nothing else."""
    away = shards_in_order(far)[1]
    asked = Counter[str]()

    def fail_twice(path: str) -> str | None:
        asked[path] += 1
        return "503" if path == away and asked[path] <= 2 else None

    store.asked = fail_twice
    stream = iter(loader(far, ahead=1))
    found = [next(stream)]
    wait_for(lambda: store.faults() == 2)
    found += stream
    assert [rows(batch) for batch in found] == [rows(batch) for batch in loader(near)]
    assert asked[away] == 3
    # Asked twice in a row by the thread; the third one is the need's own first.
    assert sum(batch.retries for batch in found) == 1


def test_a_cache_without_room_is_not_read_ahead_into(far: ShardIndex, store: faulty_s3.FaultyStore) -> None:
    tight = Cache(far.folder.cache.directory, int(2.4 * max(shard.bytes for shard in far.shards)))  # type: ignore[union-attr]
    small = load_index("s3://bucket/train", tight)
    store.served.clear()
    for step, _ in enumerate(loader(small, stop_step=SAMPLES // BATCH)):
        assert len(store.served) == step // 2 + 1
        assert not readers()


def test_shards_on_the_disk_need_no_thread(near: ShardIndex) -> None:
    for _ in loader(near, stop_step=4):
        assert not readers()


def test_a_loader_that_is_left_in_the_middle_leaves_no_thread(far: ShardIndex) -> None:
    stream = iter(loader(far, ahead=1))
    next(stream)
    assert len(readers()) == 1
    del stream
    gc.collect()
    wait_for(lambda: not readers())


LEFT = """
import sys
from pipeline.data.storage.cache import Cache
from pipeline.data.shards.index import load_index
from pipeline.data.train.stream import TrainDataset, train_loader
from pathlib import Path
import psutil

def main():
    index = load_index("s3://bucket/train", Cache(Path(sys.argv[1]), 10**9))
    data = TrainDataset(index, size=16, seed=0, streams=1, window=4)
    workers = int(sys.argv[2])
    # The worker makes one batch more, of the same shard.
    stream = iter(
        train_loader(data, global_batch=4, start_step=0, stop_step=48, workers=workers, prefetch=1, ahead=2)
    )
    next(stream)
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("workers", "kill"),
    [pytest.param("0", False, marks=pytest.mark.slow), pytest.param("1", False, marks=pytest.mark.slow), ("1", True)],
)
def test_a_fetch_that_hangs_keeps_no_process_alive(
    far: ShardIndex, store: faulty_s3.FaultyStore, tmp_path: Path, workers: str, kill: bool
) -> None:
    second, hangs, go_on = shards_in_order(far)[1], threading.Event(), threading.Event()

    def hang(path: str) -> None:
        if path == second:
            hangs.set()
            go_on.wait(300)

    store.asked = hang
    script = tmp_path / "trainer.py"
    script.write_text(LEFT)
    command = [sys.executable, script, tmp_path / "other cache", workers]
    trainer = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == int(workers)
        assert hangs.wait(120)
        if kill:
            trainer.kill()
        _, said = trainer.communicate("\n", timeout=200)
        assert trainer.returncode == (-9 if kill else 0), said
        assert "ahead.py" not in said
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
        # Nobody answered the request meanwhile.
        assert not go_on.is_set()
    finally:
        go_on.set()
        trainer.kill()
        trainer.wait()


def test_needs_are_where_a_process_first_comes_to_each_shard() -> None:
    draw = random.Random(0)
    for _ in range(200):
        streams, every = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3])
        world = draw.choice([1, 2]) if streams > 1 else 1
        sizes = [draw.randint(1, 9) for _ in range(draw.randint(1, 12))]
        order = Order(sizes, seed=draw.randint(0, 9), streams=streams, window=draw.randint(1, 10))
        batch, start, rank = streams * draw.randint(1, 3), draw.randint(0, 20), draw.randrange(world)
        stop = start + draw.randint(0, 30)
        touched: dict[int, set[int]] = {}
        for step in range(start, stop, every):
            for position in rank_positions(step, batch, streams, rank, world):
                touched.setdefault(order.locate(position).shard, set()).add(step)
        needs = list(first_needs(order, Turns(start, stop, every, batch, rank, world)))
        assert [step for step, _ in needs] == sorted(step for step, _ in needs)
        assert all(step in touched[shard] for step, shard in needs)
        first = {shard: step for step, shard in reversed(needs)}
        assert first == {shard: min(steps) for shard, steps in touched.items()}


def test_a_rank_prefetches_into_half_of_the_free_cache() -> None:
    """A rank may use half of what its shards in use leave of the cache."""
    sizes = [100] * 50
    options = {"streams": 2, "window": 10}
    # Two streams use windows of ten samples, a shard's worth, which lie in two shards.
    assert room_ahead(sizes, 500, 1000, **options) == (1000 - 400) // 2
    assert room_ahead(sizes, 500, 300, **options) == 0
    assert room_ahead(sizes, 500, 5000, **options) == 5000
