"""The lease under every order in which jobs can read and write it, and with each of them dying at each moment."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.training.cluster import lease as module
from pipeline.training.cluster.lease import Lease, LeaseLost

STEPS = 3  # a job that finds the run free reads the lease, writes it, and reads it again


class Job:
    """A job that takes the run, whose every access to the file waits for its turn."""

    def __init__(self, run: Path) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.lease: Lease | None = None
        self.refused: Exception | None = None
        self.free = False  # from now on, no turn is waited for
        self.over = False
        self._run = run
        self.thread = threading.Thread(target=self._take, daemon=True)
        self.thread.start()

    def _take(self) -> None:
        _jobs[threading.get_ident()] = self
        try:
            self.lease = Lease(self._run, renew_s=3600.0, stale_s=0.0)
        except (ConfigError, LeaseLost) as error:
            self.refused = error
        finally:
            self.over = True
            self.done.release()

    def step(self) -> None:
        """One access to the file."""
        if not self.over:
            self.go.release()
            self.done.acquire()


_jobs: dict[int, Job] = {}


def _wait() -> None:
    job = _jobs.get(threading.get_ident())
    if job is not None and not job.free:
        job.go.acquire()


def _said() -> None:
    job = _jobs.get(threading.get_ident())
    if job is not None and not job.free:
        job.done.release()


@pytest.fixture
def in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accesses wait for their turns, sleeping takes no time, and no lease is renewed."""
    read, write = Lease._read, Lease._write

    def in_turn(access: Any) -> Any:
        def wrapped(self: Lease) -> Any:
            _wait()
            found = access(self)
            _said()
            return found

        return wrapped

    monkeypatch.setattr(Lease, "_read", in_turn(read))
    monkeypatch.setattr(Lease, "_write", in_turn(write))
    monkeypatch.setattr(Lease, "_renew", lambda self: None)
    monkeypatch.setattr(module, "replace_json", lambda path, content: path.write_text(module_json(content)))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


def module_json(content: Any) -> str:
    import json

    return json.dumps(content)


def orders(jobs: int) -> Iterator[tuple[int, ...]]:
    """Every order of the steps of so many jobs."""

    def go(left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not any(left):
            yield ()
        for job, steps in enumerate(left):
            if steps:
                for rest in go((*left[:job], steps - 1, *left[job + 1 :])):
                    yield (job, *rest)

    return go((STEPS,) * jobs)


def play(run: Path, order: Sequence[int], jobs: int, dies: tuple[int, int] | None) -> list[Job]:
    """Let the jobs go in this order; one may die after so many of its steps."""
    _jobs.clear()
    made = [Job(run) for _ in range(jobs)]
    taken = [0] * jobs
    for number in order:
        if dies is None or dies != (number, taken[number]):
            made[number].step()
            taken[number] += 1
    for number, job in enumerate(made):
        if taken[number] == STEPS:
            job.thread.join(10)
    return made


def still_holds(job: Job) -> bool:
    """Whether its next look, which it takes before each checkpoint, lets it write."""
    try:
        assert job.lease is not None
        job.lease.check()
    except LeaseLost:
        return False
    return True


def check_all(tmp_path: Path, jobs: int, deaths: Sequence[tuple[int, int] | None]) -> int:
    played = 0
    for order, dies in itertools.product(orders(jobs), deaths):
        run = tmp_path / "run"
        made = play(run, order, jobs, dies)
        took = [job for number, job in enumerate(made) if job.lease is not None and (dies is None or dies[0] != number)]
        holding = [job for job in took if still_holds(job)]
        assert len(holding) <= 1, (order, dies, "two hold the run")
        alive = [job for number, job in enumerate(made) if dies is None or dies[0] != number]
        if dies is None:
            assert len(holding) == 1, (order, "nobody holds the run, and nobody died")
        assert all(job.over for job in alive), (order, dies, "a job waits for ever")
        for job in made:  # the dead are let go, to end their threads
            job.free = True
            job.go.release(10)
        for job in made:
            job.thread.join(10)
        run.with_name(".run.lease").unlink(missing_ok=True)
        played += 1
    return played


def test_two_jobs_never_hold_one_run_in_any_order(tmp_path: Path, in_turns: None) -> None:
    deaths = [None, *itertools.product(range(2), range(STEPS))]
    assert check_all(tmp_path, 2, deaths) == 20 * 7


@pytest.mark.slow
def test_three_jobs_never_hold_one_run_in_any_order(tmp_path: Path, in_turns: None) -> None:
    assert check_all(tmp_path, 3, [None]) == 1680
