"""Batches for a list of positions, in its order, made by worker processes or by this process.

Only this module uses torch's DataLoader, with one "index" per batch, so that a worker makes whole batches and the
result cannot depend on the number of workers. Faults of the user's data are returned as values, so that the user sees
the message instead of a worker's traceback.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import queues
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.config import ConfigError
from pipeline.faults import NO_SHARED_MEMORY, one_line
from pipeline.sockets import use_short_sockets

Made = TypeVar("Made", covariant=True)

_END_SECONDS = 10.0  # for the workers to leave at the end of the process
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_running: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()


class BatchPlan(Protocol):
    """The positions of each batch, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence[int]]: ...


class Batches(Generic[Made]):
    """Iterable of ``make(positions)`` for the positions of ``plan``. Raises the ConfigError that ``make`` raised."""

    def __init__(
        self,
        make: Callable[[Sequence[int]], Made],
        plan: BatchPlan,
        *,
        workers: int,
        prefetch: int = 4,
        pin: bool = False,
        start_method: str | None = None,
    ) -> None:
        self._make, self._plan = make, plan
        self._options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin}
        if workers:
            use_short_sockets()
            if (start_method or multiprocessing.get_start_method()) == "forkserver":
                multiprocessing.set_forkserver_preload(["pipeline.data.worker_server"])
            self._options |= {"prefetch_factor": prefetch, "multiprocessing_context": start_method}

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Made]:
        stream = self._stream()
        _running.add(stream)
        return stream

    def _stream(self) -> Generator[Made]:
        loader = DataLoader(
            _Maker(self._make),
            sampler=self._plan,  # type: ignore[arg-type] # torch asks for Iterable and uses __len__
            batch_size=None,
            collate_fn=_as_it_is,
            worker_init_fn=_calm_worker,
            # A separate generator, because the DataLoader draws a seed, which would change the trainer's random state
            # at a resume.
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )
        # A worker ignores signals from its start until its handlers are set.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            ready = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        try:
            for made in ready:
                if isinstance(made, ConfigError):
                    raise made
                yield made
        finally:
            # A traceback would keep the workers alive; the garbage collector would remove their queues first, and
            # workers that are not notified would take the minute of _leave_in_a_minute.
            del ready


class _Maker(Dataset[Any]):
    """The dataset whose items are batches."""

    def __init__(self, make: Callable[[Sequence[int]], Any]) -> None:
        self._make = make

    def __getitem__(self, positions: Sequence[int]) -> Any:
        try:
            return self._make(positions)
        except ConfigError as error:
            return error


def taking_turns() -> int:
    """The number of processes that share the batches of the plan in turn, this one included."""
    worker = get_worker_info()
    return 1 if worker is None else worker.num_workers


def _as_it_is(made: Any) -> Any:
    return made


def _calm_worker(_worker: int) -> None:
    """Ignore the signals that a launcher sends to every process: workers must run until the trainer has saved."""
    threading.Thread(target=_leave_with_the_trainer, daemon=True).start()
    queues.Queue._on_queue_feeder_error = staticmethod(_tell_and_leave)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # SIGTERM cannot be ignored forever, because it also ends a stuck worker; a minute is enough to save.
    signal.signal(signal.SIGTERM, _leave_in_a_minute)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _tell_and_leave(error: Exception, _batch: object) -> None:
    """Exit from the thread that sends batches, which would drop this one; the trainer would wait for it forever."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason = NO_SHARED_MEMORY if "shared memory" in text else one_line(error) or text
    sys.stderr.write(f"loader worker {os.getpid()}: {reason}\n")
    os._exit(1)


def _leave_with_the_trainer() -> None:
    """End with the trainer, even after kill -9: under forkserver torch watches the server instead of the trainer."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _leave_in_a_minute(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)


@atexit.register
def _end_workers() -> None:
    """End the workers of streams that were not read to the end, and kill stuck ones.

    multiprocessing would send them SIGTERM and wait without limit.
    """
    for stream in list(_running):
        stream.close()
    deadline = time.monotonic() + _END_SECONDS
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.join(max(0.0, deadline - time.monotonic()))
            worker.kill()
