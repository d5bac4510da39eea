"""The process that delivers the journals of a training or a sweep to MLflow while they grow.

It is a process, not a thread, because importing mlflow blocks the interpreter for seconds, a thread may hold a lock
when data-loading workers are forked, and a client that hangs or crashes must not affect the training. The trainer
writes lines to a file and, at the end, one word to a pipe; it waits for nothing else. If the trainer is killed, this
process notices, delivers the rest, closes the run as KILLED and ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from pipeline.passwords import redact
from pipeline.tracking.identity import read_identity
from pipeline.tracking.journal import JOURNAL, lock_path
from pipeline.tracking.locks import Busy, ProcessLock, is_held
from pipeline.tracking.mlflow.delivery import SHIPPING_LOCK, Delivery
from pipeline.tracking.mlflow.store import CLIENT_ENVIRONMENT, Away
from pipeline.tracking.system import SystemSampler

LOG_FILE = "mlflow.log"
_URI_VARIABLE = (
    "SELORA_SHIPPING_URI"  # not an argument, because it may hold a password and `ps` shows arguments to everyone
)
_POLL_SECONDS = 2.0
_MAX_BACKOFF_SECONDS = 15.0
_LAST_SECONDS = 15.0  # seconds for retries of the last delivery if the store was available before
_LAST_TIMEOUT = "3"  # seconds for one request at the end if the store was away before
_ORPHAN_SECONDS = 60.0
_FINISH = b"finish\n"

logger = logging.getLogger("selora.tracking")


class Shipper:
    """The trainer's handle of the delivering process.

    Args:
        run_dir: directory of the run; the process logs to run_dir/mlflow.log.
    """

    def __init__(
        self, run_dir: Path, uri: str | None, system: tuple[str, float] | None = None, below: Path | None = None
    ) -> None:
        arguments = [sys.executable, "-m", __name__, str(run_dir), str(os.getpid())]
        if below is not None:
            arguments += ["--below", str(below)]
        if system is not None:
            arguments += ["--node", system[0], "--seconds", str(system[1])]
        environment = {**CLIENT_ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop(_URI_VARIABLE, None)
        if uri is not None:
            environment[_URI_VARIABLE] = uri
        package_root = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._log = run_dir / LOG_FILE
        self._note(f"started for {run_dir}" + ("" if uri is None else f", delivering to {redact(uri)}"))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def finish(self, wait_s: float) -> bool:
        """Let it deliver the rest for at most `wait_s` seconds; returns whether it came to its own end."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_FINISH)
            self._process.stdin.close()
        except OSError:
            pass  # it has ended before; its exit code says how
        try:
            return self._process.wait(wait_s) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._note(f"not done {wait_s:.0f} s after the end of the run, and ended")
            return False

    def _note(self, text: str) -> None:
        """Write a line to the log on behalf of the process, which may have been ended before it could."""
        with suppress(OSError), self._log.open("ab") as log:
            log.write(f"{time.strftime('%H:%M:%S')}: {text}\n".encode())


def main(argv: list[str] | None = None) -> int:
    """Run alongside a trainer until it signals the end or has ended."""
    parser = argparse.ArgumentParser(prog="pipeline.tracking.mlflow.shipper", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("trainer", type=int)
    parser.add_argument("--below", type=Path, default=None)
    parser.add_argument("--node", default=None)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args(argv)
    # The trainer decides when this process ends: a signal to the whole group must not end it first.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    os.nice(5)
    trainer = _Trainer(options.trainer)
    sampler = SystemSampler(options.run_dir, options.node, options.seconds, options.trainer) if options.node else None
    uri = os.environ.pop(_URI_VARIABLE, None)
    try:
        if uri is None:
            while not trainer.ended(_ORPHAN_SECONDS):
                pass
            return 0
        return _ship(options.run_dir, uri, trainer, sampler, options.below)
    finally:
        if sampler is not None:
            sampler.stop()


class _Trainer:
    """The parent process as seen from here: its word on the pipe, or its death."""

    def __init__(self, pid: int) -> None:
        self._pid = pid  # passed as an argument, because the trainer may have died while this process was starting
        self._said = False
        self.killed = False

    def ended(self, wait_s: float) -> bool:
        """Wait at most `wait_s` seconds for the end. Forked workers may keep the pipe open: check the parent also."""
        deadline = time.monotonic() + wait_s
        while not (self._said or self.killed):
            left = deadline - time.monotonic()
            if os.getppid() != self._pid:
                self.killed = True
            elif select.select([sys.stdin.fileno()], [], [], max(0.0, min(left, 1.0)))[0]:
                self._said = os.read(sys.stdin.fileno(), len(_FINISH)) == _FINISH
                self.killed = not self._said
            elif left <= 0:
                return False
        return True


def _ship(run_dir: Path, uri: str, trainer: _Trainer, sampler: SystemSampler | None, below: Path | None) -> int:
    lock = _take_lock(run_dir, trainer)
    if lock is None:
        return 1
    with lock, _Fleet(run_dir, uri, below) as fleet:
        delay, well = 0.0, True
        while not trainer.ended(delay):
            try:
                fleet.deliver()
                delay, well = _POLL_SECONDS, True
            except Away as away:
                delay, well = min(max(1.0, 2 * delay), _MAX_BACKOFF_SECONDS), False
                logger.warning("%s: %s; next attempt in %.0f s", time.strftime("%H:%M:%S"), away, delay)
        if sampler is not None:
            sampler.stop()
        if trainer.killed:
            fleet.wait_for_writers(_ORPHAN_SECONDS)
        return 0 if _deliver_last(fleet, well, _ORPHAN_SECONDS if trainer.killed else _LAST_SECONDS) else 1


class _Fleet:
    """The trainer's run and those in the folder `below`; only this process delivers them."""

    def __init__(self, run_dir: Path, uri: str, below: Path | None) -> None:
        identity = read_identity(run_dir)
        assert identity is not None, "the tracker writes run.json before it starts this process"
        self._uri, self._below = uri, below
        self._locks: list[ProcessLock] = []
        self._deliveries = {run_dir: Delivery(run_dir, uri, identity)}

    def deliver(self, *, last: bool = False) -> None:
        """Send the content of all journals; raises Away at the first run that fails, which is then tried last.

        So an unavailable store costs one attempt, and a refused run does not delay the others.
        """
        self._look_below()
        for run_dir, delivery in list(self._deliveries.items()):
            try:
                delivery.deliver(last=last)
            except Away:
                self._deliveries[run_dir] = self._deliveries.pop(run_dir)
                raise

    def wait_for_writers(self, seconds: float) -> None:
        """Wait a limited time until the child runs' processes have ended, as they do after their parent was killed."""
        deadline = time.monotonic() + seconds
        while any(is_held(lock_path(run_dir / JOURNAL)) for run_dir in self._deliveries):
            if time.monotonic() >= deadline:
                return
            time.sleep(1.0)

    def _look_below(self) -> None:
        for path in sorted(self._below.glob(f"*/{JOURNAL}")) if self._below is not None else ():
            run_dir = path.parent
            identity = None if run_dir in self._deliveries else read_identity(run_dir)
            if identity is None:
                continue
            with suppress(Busy):  # `selora track sync` is running, or the process of an earlier attempt
                self._locks.append(ProcessLock(run_dir / SHIPPING_LOCK))
                self._deliveries[run_dir] = Delivery(run_dir, self._uri, identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lock in self._locks:
            lock.release()


def _take_lock(run_dir: Path, trainer: _Trainer) -> ProcessLock | None:
    """The right to deliver; the process of an earlier attempt may still be delivering the rest."""
    while True:
        ended = trainer.ended(0.0)
        try:
            return ProcessLock(run_dir / SHIPPING_LOCK, wait_s=_ORPHAN_SECONDS if ended else 1.0)
        except Busy as busy:
            logger.warning("%s is delivering this run", busy)
            if ended:
                return None


def _deliver_last(fleet: _Fleet, well: bool, seconds: float) -> bool:
    """Deliver the rest: one short attempt if the store was away, several if it was available."""
    if not well:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = min(
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], _LAST_TIMEOUT, key=int
        )
    deadline = time.monotonic() + (seconds if well else 0.0)
    while True:
        try:
            fleet.deliver(last=True)
            return True
        except Away as away:
            logger.warning("%s", away)
            if time.monotonic() + 1.0 >= deadline:
                return False
        time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
