"""Prefetching of remote shards by a thread of each loader process while it uses the current ones.

A process prefetches the shards that it will need itself, in this order, so any remaining waits and retries belong to a
batch of this process. A failed prefetch is dropped: when the shard is needed, it is requested again, and then any fault
is reported.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import ConfigError
from pipeline.data.order import Ints, Order, rank_streams
from pipeline.data.shards.index import ShardIndex, fetch_shard

logger = logging.getLogger("selora.data")


@dataclass(frozen=True)
class Turns:
    """The steps for which one process of a rank makes batches: every ``every``-th in [start, stop)."""

    start: int
    stop: int
    every: int
    global_batch: int
    rank: int
    world: int

    def has(self, steps: Ints) -> np.ndarray:
        return (steps >= self.start) & (steps < self.stop) & ((steps - self.start) % self.every == 0)


def first_needs(order: Order, turns: Turns) -> Iterator[tuple[int, int]]:
    """(step, shard) whenever a stream reaches a shard that its previous window did not use; in rising steps."""
    streams = rank_streams(order.streams, turns.rank, turns.world)
    before: dict[int, dict[int, int]] = {stream: {} for stream in streams}
    for epoch, window in _windows(order, turns):
        found = []
        for stream in streams:
            needed = _first_steps(order, turns, epoch, stream, window)
            found += [(step, shard) for shard, step in needed.items() if shard not in before[stream]]
            before[stream] = needed
        yield from sorted(found)


def _windows(order: Order, turns: Turns) -> Iterator[tuple[int, int]]:
    """(epoch, window) in the order of the steps."""
    begin, end = turns.start * turns.global_batch, turns.stop * turns.global_batch
    for epoch in range(begin // order.samples, -(-end // order.samples)):
        passed = max(0, begin - epoch * order.samples) // order.streams
        for window in range(max(0, passed - 1) // order.window, order.windows()):
            yield epoch, window


def _first_steps(order: Order, turns: Turns, epoch: int, stream: int, window: int) -> dict[int, int]:
    """{shard: first step} of this rank in one window of a stream."""
    positions, shards = order.in_window(epoch, stream, window)
    steps = positions // turns.global_batch
    mine = turns.has(steps)
    numbers, at = np.unique(shards[mine], return_index=True)
    return dict(zip(numbers.tolist(), steps[mine][at].tolist(), strict=True))


def room_ahead(sizes: list[int], samples: int, max_bytes: int, *, streams: int, window: int) -> int:
    """Bytes that a rank of ``streams`` may have prefetched, in a cache with ``max_bytes`` for it.

    Half of the space that the shards in use leave: a full cache evicts the oldest, which are roughly, but not exactly,
    the shards that are no longer needed. A set that fits as a whole has no such limit.
    """
    total = sum(sizes)
    if total <= max_bytes:
        return total
    mean = total / len(sizes)
    in_use = streams * mean * (1 + window * len(sizes) / samples)
    return max(0, int(max_bytes - in_use) // 2)


class ReadAhead:
    """Calls ``fetch`` in a thread for the shards of ``needs``, before they are needed.

    From ``step`` on, at most ``shards`` shards and ``room`` bytes ahead; shards that are ``at_hand`` are skipped.
    """

    def __init__(
        self,
        fetch: Callable[[int], None],
        needs: Iterator[tuple[int, int]],
        sizes: list[int],
        *,
        step: int,
        shards: int,
        room: int,
        at_hand: Container[int] = (),
    ) -> None:
        self._fetch, self._needs, self._sizes, self._at_hand = fetch, needs, sizes, at_hand
        self._shards, self._room = shards, room
        self._ahead: deque[tuple[int, int]] = deque()
        self._step, self._closed = step, False
        self._changed = threading.Condition()
        # A daemon, so that an ending process does not wait for a store; the received part stays for the next process.
        threading.Thread(target=self._run, name="selora-read-ahead", daemon=True).start()

    def reached(self, step: int) -> None:
        """Mark ``step`` as current: its shards no longer count as prefetched."""
        with self._changed:
            self._step = step
            while self._ahead and self._ahead[0][0] <= step:
                self._ahead.popleft()
            self._changed.notify()

    def close(self) -> None:
        """End the thread after its current fetch."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        for step, shard in self._needs:
            if not self._admitted(step, self._sizes[shard]):
                return
            # Shards of earlier steps are present or have failed; some of the current step's may still arrive in time.
            if step < self._step or shard in self._at_hand:
                continue
            try:
                self._fetch(shard)
            except ConfigError as error:
                logger.info("%s; a prefetch, so it is fetched again when it is needed", error)

    def _admitted(self, step: int, size: int) -> bool:
        """Wait until the shard may be fetched; False if no more are to be fetched."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or step <= self._step or self._fits(size))
            if step > self._step:
                self._ahead.append((step, size))
            return not self._closed

    def _fits(self, size: int) -> bool:
        return len(self._ahead) < self._shards and size + sum(held for _, held in self._ahead) <= self._room


def read_ahead(
    index: ShardIndex, order: Order, turns: Turns, shards: int, sharing: int, at_hand: Container[int]
) -> ReadAhead | None:
    """Start prefetching ``shards`` per stream, if the shards are remote.

    The limit is the space in the cache, which ``sharing`` ranks share.
    """
    cache = index.folder.cache
    if cache is None or not shards:
        return None
    streams, sizes = len(rank_streams(order.streams, turns.rank, turns.world)), [shard.bytes for shard in index.shards]
    room = room_ahead(sizes, index.samples, cache.max_bytes // sharing, streams=streams, window=order.window)
    if room < min(sizes):
        return None
    # The order caches its last result and is not thread-safe.
    needs = first_needs(copy.deepcopy(order), turns)
    return ReadAhead(
        lambda shard: fetch_shard(index, shard),
        needs,
        sizes,
        step=turns.start,
        shards=shards * streams,
        room=room,
        at_hand=at_hand,
    )
