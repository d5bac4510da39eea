"""The ranks that share an evaluation: who does which part, and how the parts come together.

Work is cut at places that do not depend on the number of ranks (batches of samples, chunks of classes, chunks of
queries) and dealt out in turn. Every rank count so multiplies the same matrices, and the results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """The indices of `pieces` that this rank works on: every size-th, so shares differ by one at most."""
        return range(self.rank, pieces, self.size)

    def from_first(self, work: Callable[[], T]) -> T:
        """Let rank 0 work and give the result to all: files are read by one, so all ranks decide alike."""
        return self.gather(work if self.rank == 0 else lambda: None)[0]  # pyright: ignore[reportReturnType]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Results of `work` of all ranks, in rank order, on every rank.

        An error on one rank is raised on all of them. Without that, the others would wait for it in the next
        collective until its time-out, and the message with the cause would be lost among theirs.
        """
        if self.size == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 (raised again below, on every rank)
            error = caught
        described = None if error is None else (isinstance(error, ConfigError), f"{type(error).__name__}: {error}")
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (result, described))
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                users_fault, message = failure
                raise (ConfigError if users_fault else RuntimeError)(f"on rank {rank}: {message}")
        return [part for part, _ in gathered]
