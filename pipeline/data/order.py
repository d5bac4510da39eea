"""The order of training samples as a pure function of (seed, position); nothing here reads a file or keeps state.

A *position* p counts samples since the first step: step g with global batch B covers p in [g*B, (g+1)*B), epoch e
covers [e*N, (e+1)*N). Stream c holds the positions with p % S == c. In each epoch the samples in seeded shard order are
cut into S contiguous runs, one per stream, and a stream reads its run through a seeded permutation within windows.

So every sample occurs once per epoch, all ranks have equally many steps, a resume needs only the step number, and the
global batches are the same on any number of ranks that divides S.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError

Ints = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15


def stable_hash(*parts: int | str) -> int:
    """63 bits of ``parts``, equal in every process, on every machine and in every Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeded_permutation(n: int, seed: int) -> Ints:
    """A permutation of 0..n-1 by sorting SplitMix64 values: only integers, so it cannot change with a library."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64)


def draw_without_repetition(choices: int, seed: int, sample_id: str, epoch: int) -> int:
    """The caption of a sample in ``epoch``, out of ``choices``: each occurs once in ``choices`` epochs."""
    if choices == 1:
        return 0
    turn, place = divmod(epoch, choices)
    return int(seeded_permutation(choices, stable_hash("caption", seed, sample_id, turn))[place])


@dataclass(frozen=True)
class Place:
    """The sample at a position: epoch, shard (its number in the index), sample (its number in the shard)."""

    epoch: int
    shard: int
    sample: int


class Order:
    """Positions to places, for shards of ``shard_sizes`` samples cut into ``streams``."""

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, streams: int, window: int) -> None:
        if streams < 1 or window < 1:
            raise ConfigError(f"data.streams ({streams}) and data.shuffle_window ({window}) must be at least 1")
        self.sizes: Ints = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples < 1 or int(self.sizes.min()) < 0:
            raise ConfigError("the shards hold no sample")
        self.seed, self.streams, self.window = seed, streams, window
        self._epochs: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], Ints] = OrderedDict()

    def locate(self, position: int) -> Place:
        """The sample at ``position``."""
        epoch, run_start, count, offset = self._in_run(position)
        number, inside = divmod(offset, self.window)
        size = min(self.window, count - number * self.window)
        stream = position % self.streams
        rank_in_order = run_start + number * self.window + int(self._window(epoch, stream, number, size)[inside])
        shards, ends = self._shard_order(epoch)
        at = int(np.searchsorted(ends, rank_in_order, side="right"))
        before = int(ends[at - 1]) if at else 0
        return Place(epoch, int(shards[at]), rank_in_order - before)

    def windows(self) -> int:
        """Windows of the longest stream in an epoch."""
        return -(-self.samples // (self.streams * self.window))

    def in_window(self, epoch: int, stream: int, number: int) -> tuple[Ints, Ints]:
        """The rising positions of one window of a stream, and the shard of each: two arrays of at most ``window``."""
        start = epoch * self.samples
        first = start + (stream - start) % self.streams
        _, run_start, count, _ = self._in_run(first)
        before = number * self.window
        size = min(self.window, count - before)
        # If an epoch has fewer samples than streams, this stream's first position may be in the next epoch.
        if size <= 0 or first >= start + self.samples:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        in_order = run_start + before + self._window(epoch, stream, number, size)
        shards, ends = self._shard_order(epoch)
        positions = first + self.streams * np.arange(before, before + size, dtype=np.int64)
        return positions, shards[np.searchsorted(ends, in_order, side="right")]

    def _in_run(self, position: int) -> tuple[int, int, int, int]:
        """(epoch, start of the stream's run in the shard order, length of the run, offset in the run)."""
        epoch, start = position // self.samples, position // self.samples * self.samples
        stream = position % self.streams
        # Stream c's first position is start + (c - start) % S, so streams differ in length by at most one; the long
        # ones are the first N % S residues from start % S on.
        whole, extra = divmod(self.samples, self.streams)
        shift = start % self.streams
        rank = (stream - shift) % self.streams
        count = whole + (rank < extra)
        longer_before = _count_wrapped(shift, extra, self.streams, stream)
        run_start = stream * whole + longer_before
        return epoch, run_start, count, (position - start - rank) // self.streams

    def _shard_order(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's shards in reading order, and the running total of their samples."""
        known = self._epochs.get(epoch)
        if known is None:
            shards = seeded_permutation(len(self.sizes), stable_hash("shards", self.seed, epoch))
            known = shards, np.cumsum(self.sizes[shards])
            self._epochs[epoch] = known
            if len(self._epochs) > 4:
                self._epochs.popitem(last=False)
        return known

    def _window(self, epoch: int, stream: int, number: int, size: int) -> Ints:
        key = (epoch, stream, number)
        known = self._windows.get(key)
        if known is None:
            known = seeded_permutation(size, stable_hash("window", self.seed, epoch, stream, number))
            self._windows[key] = known
            if len(self._windows) > 2 * self.streams:
                self._windows.popitem(last=False)
        return known


def _count_wrapped(first: int, length: int, modulus: int, below: int) -> int:
    """The number of the ``length`` residues first, first+1, .. (mod ``modulus``) that are smaller than ``below``."""
    end = first + length
    straight = max(0, min(below, end) - first)
    wrapped = max(0, min(below, end - modulus))
    return straight + wrapped


def check_split(global_batch: int, streams: int, world: int) -> None:
    """Raise ConfigError unless the ranks can share the streams and every batch takes equally many samples from each."""
    if streams % world:
        near = streams // world * world or world
        raise ConfigError(
            f"data.streams: {streams} streams cannot be shared by {world} ranks; take a number of ranks that divides "
            f"it, or data.streams={near} (which is another order of the samples)"
        )
    if global_batch < 1 or global_batch % streams:
        near = max(1, round(global_batch / streams)) * streams
        raise ConfigError(
            f"train.global_batch_size: {global_batch} is not a multiple of data.streams ({streams}); {near} would be"
        )


def rank_streams(streams: int, rank: int, world: int) -> list[int]:
    """The streams of ``rank``, in rising order."""
    return [stream for stream in range(streams) if stream * world // streams == rank]


def rank_positions(step: int, global_batch: int, streams: int, rank: int, world: int) -> list[int]:
    """The rising positions of ``rank`` in ``step``; the ranks' lists are disjoint and make up the global batch."""
    start, mine = step * global_batch, rank_streams(streams, rank, world)
    return [start + turn + stream for turn in range(0, global_batch, streams) for stream in mine]
