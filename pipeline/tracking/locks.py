"""A lock file for each task that only one process may do at a time.

These are POSIX record locks: they end with their process (even after kill -9), and a forked data-loading worker that
outlives its parent does not keep them, as it would keep a flock. Their disadvantage: closing any handle of the file
drops the lock, so only this module opens lock files, and a table lists the locks of this process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_POLL_SECONDS = 0.1
_held: dict[tuple[int, Path], int] = {}  # with the process id, because a fork inherits the table but not the locks


class Busy(Exception):
    """Another process holds the lock; the message names it."""


class ProcessLock:
    """An exclusive lock on `path`; waits for it at most `wait_s` seconds.

    Raises:
        Busy: it is held, by this process or another.
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
        """Release the lock; a second call does nothing."""
        if self._fd is not None and self._key[0] == os.getpid():
            del _held[self._key]
            os.close(self._fd)
        self._fd = None

    def __enter__(self) -> ProcessLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether any process, including this one, holds the lock at `path`."""
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
        # a file system without locks: continuing unprotected is better than refusing to train
    return True


def _holder(fd: int) -> str:
    text = os.pread(fd, 64, 0).decode(errors="replace").strip()
    return f"process {text}" if text else "another process"


def _write_holder(fd: int) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    except OSError:
        pass  # only information for a waiting process; on a full disk the lock itself still works
