"""One lock file per thing that only one process may do at a time.

POSIX record locks on purpose: they die with their process (kill -9 included), and a forked data-loading worker that
outlives its parent does not keep them, as it would keep a flock. Their price: closing any handle of the file drops the
lock, so nothing but this module ever opens a lock file, and a table remembers what this process holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_POLL_SECONDS = 0.1
_held: dict[tuple[int, Path], int] = {}  # by process id too: a fork inherits the table and not the locks


class Busy(Exception):
    """Another process holds the lock; the message names it."""


class ProcessLock:
    """An exclusive lock on `path`, waited for at most `wait_s` seconds.

    Raises:
        Busy: another holder has it, in this process or in another.
        OSError: the lock file cannot be created.
    """

    def __init__(self, path: Path, wait_s: float = 0.0) -> None:
        self.path = path.resolve()
        self._key = (os.getpid(), self.path)
        if self._key in _held:
            raise Busy("this same process")
        self._fd: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_s
        while not _try_lock(self._fd):
            if time.monotonic() >= deadline:
                holder = _holder(self._fd)
                os.close(self._fd)
                raise Busy(holder)
            time.sleep(_POLL_SECONDS)
        _held[self._key] = self._fd
        _write_holder(self._fd)

    def release(self) -> None:
        """Give the lock up; calling it again does nothing."""
        if self._fd is not None and self._key[0] == os.getpid():
            del _held[self._key]
            os.close(self._fd)
        self._fd = None

    def __enter__(self) -> ProcessLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether some process, this one included, holds the lock at `path` now."""
    if (os.getpid(), path.resolve()) in _held:
        return True
    if not path.exists():
        return False
    try:
        ProcessLock(path).release()
    except (Busy, OSError):
        return True
    return False


def _try_lock(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        # a file system without locks: going on unprotected beats refusing to train
    return True


def _holder(fd: int) -> str:
    text = os.pread(fd, 64, 0).decode(errors="replace").strip()
    return f"process {text}" if text else "another process"


def _write_holder(fd: int) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    except OSError:
        pass  # only a courtesy for the one who waits; on a full disk the lock itself still holds
