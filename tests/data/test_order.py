"""The order of training as a pure function: once an epoch, equal steps, the same batches on any number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.data.order import (
    Order,
    check_split,
    draw_without_repetition,
    rank_positions,
    seeded_permutation,
    stable_hash,
)

SHARDS = [(17,), (5, 7, 3), (1, 1, 30, 9), (64,) * 5, (3,), (100, 0, 41)]


def places(order: Order, positions: range) -> list[tuple[int, int]]:
    return [(place.shard, place.sample) for place in map(order.locate, positions)]


def by_the_book(sizes: tuple[int, ...], seed: int, streams: int, window: int, epoch: int) -> list[tuple[int, int]]:
    """One epoch built step by step from the words of the design, with lists instead of arithmetic."""
    total = sum(sizes)
    shards = seeded_permutation(len(sizes), stable_hash("shards", seed, epoch))
    line = [(int(shard), i) for shard in shards for i in range(sizes[shard])]
    positions = range(epoch * total, (epoch + 1) * total)
    found: dict[int, tuple[int, int]] = {}
    for stream in range(streams):
        mine = [p for p in positions if p % streams == stream]
        run, line = line[: len(mine)], line[len(mine) :]
        for number, start in enumerate(range(0, len(run), window)):
            part = run[start : start + window]
            shuffled = seeded_permutation(len(part), stable_hash("window", seed, epoch, stream, number))
            found |= zip(mine[start : start + window], [part[i] for i in shuffled], strict=True)
    return [found[p] for p in positions]


@pytest.mark.parametrize(("sizes", "streams", "window"), itertools.product(SHARDS, (1, 4, 16, 64), (1, 3, 2048)))
def test_locate_follows_the_design_in_every_epoch(sizes: tuple[int, ...], streams: int, window: int) -> None:
    order = Order(sizes, seed=3, streams=streams, window=window)
    total = sum(sizes)
    for epoch in (0, 1, 2, 7):
        positions = range(epoch * total, (epoch + 1) * total)
        found = places(order, positions)
        assert found == by_the_book(sizes, 3, streams, window, epoch)
        assert sorted(found) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]
        assert {order.locate(p).epoch for p in positions} == {epoch}


def test_locate_does_not_depend_on_what_was_asked_before() -> None:
    order, positions = Order((40, 25, 60), seed=1, streams=8, window=5), list(range(3 * 125))
    forward = [order.locate(p) for p in positions]
    draw = np.random.default_rng(0)
    for p in draw.permutation(positions):
        assert order.locate(int(p)) == forward[p]
    assert [Order((40, 25, 60), seed=1, streams=8, window=5).locate(p) for p in positions] == forward


@pytest.mark.parametrize(("global_batch", "streams"), [(8, 8), (16, 8), (24, 8), (64, 64), (512, 64)])
def test_ranks_share_out_each_global_batch_in_equal_parts(global_batch: int, streams: int) -> None:
    for world, step in itertools.product((1, 2, 4, 8), (0, 1, 13)):
        parts = [rank_positions(step, global_batch, streams, rank, world) for rank in range(world)]
        assert [len(part) for part in parts] == [global_batch // world] * world
        assert sorted(itertools.chain(*parts)) == list(range(step * global_batch, (step + 1) * global_batch))
        for rank, part in enumerate(parts):
            assert {p % streams * world // streams for p in part} == {rank}
            assert part == sorted(part)


def test_a_rank_opens_only_the_shards_of_its_streams() -> None:
    """A rank reads whole streams so it opens only its own runs of shards."""
    order = Order((32,) * 32, seed=0, streams=16, window=2048)
    per_rank = [
        {order.locate(p).shard for step in range(8) for p in rank_positions(step, 128, 16, rank, 4)}
        for rank in range(4)
    ]
    assert all(len(shards) <= 9 for shards in per_rank)


def test_epochs_and_seeds_give_other_orders() -> None:
    order, other = (Order((50, 50, 50), seed=seed, streams=4, window=16) for seed in (0, 1))
    first, second = places(order, range(150)), places(order, range(150, 300))
    assert first != second
    assert first != places(other, range(150))


def test_a_window_mixes_samples_of_its_part_only() -> None:
    """A window mixes samples and never leaves its part of the run."""
    order = Order((400,), seed=0, streams=4, window=10)
    offsets = np.array(
        [[order.locate(stream + 4 * k).sample - 100 * stream for k in range(100)] for stream in range(4)]
    )
    assert (offsets // 10 == np.arange(100) // 10).all()
    assert (offsets != np.arange(100)).mean() > 0.7


def test_the_shuffle_is_uniform_enough_for_training() -> None:
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), seeded_permutation(8, stable_hash("x", seed))] += 1
    assert counts.min() > 420
    assert counts.max() < 580


def test_the_hash_and_the_permutation_are_the_same_for_ever() -> None:
    # A change here changes every run's data order and makes old checkpoints resume into another stream.
    assert stable_hash("shards", 0, 1) == 4148862007039966608
    assert seeded_permutation(10, 7).tolist() == [1, 8, 5, 7, 0, 9, 4, 6, 3, 2]
    assert stable_hash("a", 1) != stable_hash("a1")


@pytest.mark.parametrize("choices", [1, 2, 7, 80])
def test_captions_come_once_each_before_one_comes_again(choices: int) -> None:
    for turn in range(3):
        drawn = [draw_without_repetition(choices, 5, "shard/key", turn * choices + i) for i in range(choices)]
        assert sorted(drawn) == list(range(choices))
    two = [[draw_without_repetition(80, 5, key, epoch) for epoch in range(80)] for key in ("a", "b")]
    assert two[0] != two[1]


def test_what_cannot_be_shared_out_is_an_error_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size: 100 .* data.streams \(64\); 128"):
        check_split(100, 64, 2)
    with pytest.raises(ConfigError, match="64 streams cannot be shared by 3 ranks.*data.streams=63"):
        check_split(64, 64, 3)
    with pytest.raises(ConfigError, match="no sample"):
        Order((0, 0), seed=0, streams=1, window=1)
    with pytest.raises(ConfigError, match=r"data.streams \(0\)"):
        Order((3,), seed=0, streams=0, window=1)
