"""The ranks that share an evaluation: the part of each, and how the parts are combined.

Classes and queries are cut into chunks that do not depend on the number of ranks and are assigned in turn; samples are
assigned in contiguous parts. The results are integer counts, or embeddings in the order of the dataset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.config import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that evaluate; one process when torch.distributed is not initialised."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Ranks:
        if dist.is_available() and dist.is_initialized():
            return Ranks(dist.get_rank(), dist.get_world_size())
        return Ranks()

    def share(self, pieces: int) -> range:
        """The indices of `pieces` for this rank: every size-th, so shares differ by at most one."""
        return range(self.rank, pieces, self.size)

    def from_first(self, work: Callable[[], T]) -> T:
        """Run on rank 0 and give the result to all ranks: only one reads files, so all decide the same."""
        return self.gather(work if self.rank == 0 else lambda: None)[0]  # pyright: ignore[reportReturnType]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Results of `work` of all ranks, in rank order, on every rank.

        An error on one rank is raised on all of them. Otherwise the others would wait in the next collective until
        its timeout, and the message with the cause would be lost among theirs.
        """
        return self._run(work, lambda result: result)

    def together(self, work: Callable[[], T]) -> T:
        """This rank's own result of `work`, once it has succeeded on all ranks."""
        results: list[T] = []
        self._run(lambda: results.append(work()), lambda _: None)
        return results[0]

    def _run(self, work: Callable[[], T], sent: Callable[[T], Any]) -> list[Any]:
        if self.size == 1:
            return [sent(work())]
        parcel, error = None, None
        try:
            parcel = sent(work())
        except Exception as caught:  # noqa: BLE001 (raised again below, on every rank)
            error = caught
        described = None if error is None else (isinstance(error, ConfigError), str(error) or type(error).__name__)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (parcel, described))
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                users_fault, message = failure
                raise (ConfigError if users_fault else RuntimeError)(f"on rank {rank}: {message}")
        return [part for part, _ in gathered]


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun, deepspeed or srun started, as a gloo group; one process without a launcher.

    gloo is used even with GPUs, because only counts and embeddings on the CPU are exchanged. So ranks may share a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()
