"""A lease next to the run's directory: one job per run, even across hosts.

The file names its holder and has a number that the holder increases every few seconds. A job that claims the run
watches whether the number changes, so no two clocks are compared. On the same boot of the same host and in the same PID
namespace, the holder's process is looked up instead, and its death is noticed at once. A holder that was presumed dead
and returns (a frozen node, a cut network file system) finds another name in the file and may no longer write.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Ended
from pipeline.files import read_json, replace_json

RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
_CONFIRM_SECONDS = 0.2

logger = logging.getLogger("selora.training")


class LeaseLost(Ended):
    """Another job has taken the run over; this one must not write."""


class Lease:
    """The right to write the run in `run_dir`.

    Args:
        run_dir: the run; the lease is a file next to it, so that the directory may be moved.
        renew_s: seconds between two signs of life.
        stale_s: seconds without a sign of life after which the lease is free.

    Raises:
        ConfigError: a living job holds the run.
        LeaseLost: another job took the run at the same moment.
    """

    def __init__(self, run_dir: Path, renew_s: float = RENEW_SECONDS, stale_s: float = STALE_SECONDS) -> None:
        self._path = run_dir.with_name(f".{run_dir.name}.lease")
        self._renew_s, self._beat = renew_s, 0
        self._own = {
            "holder": uuid.uuid4().hex,
            **_place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "job": next(
                (os.environ[name] for name in ("SLURM_JOB_ID", "RAY_JOB_ID", "HOSTNAME") if name in os.environ), ""
            ),
        }
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._lost = False
        self._wait_for(run_dir, stale_s)
        self._write()
        # If two jobs found it free at once, the later writer holds it.
        time.sleep(_CONFIRM_SECONDS)
        self.check()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the last sign of life found the run taken over."""
        return self._lost

    def check(self) -> None:
        """Raise LeaseLost if another job has taken the run over."""
        found = self._read()
        if found is not None and found["holder"] != self._own["holder"]:
            raise LeaseLost(
                f"{self._path}: this run was taken over by {_name(found)} while this job gave no sign of life; "
                f"this job writes nothing more"
            )

    def release(self) -> None:
        """Release the run, unless another job has taken it over."""
        self._over.set()
        self._thread.join()
        found = self._read()
        if found is not None and found["holder"] == self._own["holder"]:
            self._path.unlink(missing_ok=True)

    def _wait_for(self, run_dir: Path, stale_s: float) -> None:
        """Return once no living job holds the run; a holder in this process table is looked up, others are watched."""
        first = self._read()
        if first is None or _is_dead_here(first):
            return
        logger.warning("%s: waiting up to %.0f s to see whether %s is alive", run_dir, stale_s, _name(first))
        deadline = time.monotonic() + stale_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._renew_s))
            now = self._read()
            if now is None or _is_dead_here(now):
                return
            if (now["holder"], now["beat"]) != (first["holder"], first["beat"]):
                raise ConfigError(
                    f"{run_dir}: {_name(now)} is training this run; wait for it, end it, or choose another name=…"
                )
        logger.warning("%s: %s is gone, taking over", run_dir, _name(first))

    def _renew(self) -> None:
        while not self._over.wait(self._renew_s):
            try:
                self.check()
                self._write()
            except LeaseLost:
                self._lost = True  # the job's own check ends it, with the message
                return
            except OSError as error:
                logger.warning("%s cannot be renewed: %s", self._path, error.strerror)

    def _read(self) -> dict[str, Any] | None:
        try:
            return read_json(self._path)
        except (FileNotFoundError, ValueError):
            return None

    def _write(self) -> None:
        self._beat += 1
        replace_json(self._path, self._own | {"beat": self._beat})


@contextmanager
def held(run_dir: Path, wanted: bool) -> Iterator[Lease | None]:
    """The run's lease for the duration of the block, on the one rank that writes; None on the others."""
    if not wanted:
        yield None
        return
    lease = Lease(run_dir)
    try:
        yield lease
    finally:
        lease.release()


def _place() -> dict[str, str]:
    """Identifies this process table; "" if /proc does not tell. Containers may share a host name."""
    boot = processes = ""
    with suppress(OSError):
        if str(Path("/proc/self").readlink()) == str(os.getpid()):  # otherwise /proc belongs to another namespace
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            processes = str(Path("/proc/self/ns/pid").readlink())
    return {"host": os.uname().nodename, "boot": boot, "processes": processes}


def _started(pid: int) -> int | None:
    """Start of a process in ticks since the boot, which no clock change affects; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def _is_dead_here(found: dict[str, Any]) -> bool:
    """Whether the holder must be dead because it would be visible here; a lease of an older version is only watched."""
    place = _place()
    if not place["processes"] or any(found.get(key) != value for key, value in place.items()):
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(found["pid"]) not in (None, found["started"])


def _name(found: dict[str, Any]) -> str:
    job = f" (job {found['job']})" if found["job"] else ""
    return f"process {found['pid']} on {found['host']}{job}"
