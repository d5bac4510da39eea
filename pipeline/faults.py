"""Errors of the operating system in one line: where, what, and the way out.

Python names the file of an error when it opens one, but not when it writes to it; safetensors keeps the error number in
a text, and a loading process sends only its traceback. All of them become the same line.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

_PLACE = "give a place that you may read and write"
_SPACE = "free space there or give another place; what was complete before is intact"
WAYS_OUT = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: "free some of your quota or give another place; what was complete before is intact",
    errno.EFBIG: "raise `ulimit -f`, or give a file system that takes files of this size",
    errno.EROFS: "give a place that can be written, or have this one mounted for writing",
    errno.ENAMETOOLONG: "give a shorter name=… or a shorter path",
    errno.EIO: "the disk or its network failed: see the system's log, or give another place",
    errno.ESTALE: "the network file system lost the file: mount it again, or give another place",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "this machine has too many open files: end what holds them",
    errno.ELOOP: "its symbolic links lead in a circle: mend them, or give another place",
    errno.EINVAL: "this file system does not take such a file or name: give another place",
    errno.ENOENT: "look for a mistyped path, or give another place",
    errno.ENOTEMPTY: "something else writes there: end it, or give another place",
    errno.EBUSY: "something else uses it: end that, or give another place",
    errno.ENOMEM: "not enough memory: fewer workers or a smaller batch need less",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENXIO), _PLACE),
}
NO_SHARED_MEMORY = (
    "/dev/shm has no room for a batch: give it more, as by `docker run --shm-size=4g`, or load the data without "
    "workers: data.workers=0, --workers 0"
)
_KILLED = re.compile(r"killed by signal: ([^.]+)")
_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
_QUOTED = re.compile(r"\[Errno \d+\] [^:\n]*: '([^'\n]+)'")
FULL = (errno.ENOSPC, errno.EDQUOT)


def number_of(error: BaseException) -> int | None:
    """The system's error number behind an error; None if there is none.

    Args:
        error: an OSError, or an error into which safetensors or a loading process turned one.

    Returns:
        A number as in `errno`.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] != "safetensors":
        return None
    found = _NUMBER.findall(str(error))
    return int("".join(found[-1])) if found else None


def one_line(error: BaseException) -> str | None:
    """The line for the user; None if the error does not come from the system.

    Args:
        error: as it was caught, with its traceback.

    Returns:
        "PATH: REASON; WAY OUT", without PATH if no file is known.
    """
    if isinstance(error, UnicodeEncodeError):
        where = error.object if isinstance(error.object, str) else ""
        return f"{where!a}: cannot be written in this locale's {error.encoding}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "~: this process has no home directory; set HOME, or write the whole path"
    number = number_of(error)
    if number is None and not isinstance(error, OSError):
        return None
    place = _place_of(error)
    reason = os.strerror(number) if number in WAYS_OUT else (getattr(error, "strerror", None) or _last_line(error))
    way_out = WAYS_OUT.get(number or 0)
    return f"{place + ': ' if place else ''}{reason}{'; ' + way_out if way_out else ''}"


def lost_worker(error: BaseException) -> str | None:
    """The line for the user where a process that loads data has ended, None for another error.

    Args:
        error: torch's, which may be raised at any moment of the process that waits for the data.
    """
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in str(error):
        return None
    killed = _KILLED.search(str(error))
    if killed is None:
        return "a loader worker ended, see its line above; the same command continues"
    if killed[1] == "Bus error":
        return f"a loader worker was killed: {NO_SHARED_MEMORY}"
    return (
        f"a loader worker was killed ({killed[1]}): where the machine ran out of memory, fewer workers or a smaller "
        "batch need less; the same command continues"
    )


def _place_of(error: BaseException) -> str:
    """The file of the error; if it names none, the file that the innermost frames were working on."""
    name = getattr(error, "filename", None)
    if isinstance(name, str | bytes | os.PathLike):
        return os.fsdecode(name)
    quoted = _QUOTED.findall(str(error))
    if quoted:
        return quoted[-1]
    for frame in reversed(list(_frames(error.__traceback__))):
        values = list(reversed(frame.values()))
        files = [value.name for value in values if hasattr(value, "fileno") and isinstance(value.name, str)]
        paths = [str(value) for value in values if isinstance(value, Path)]
        named = [frame["filename"]] if isinstance(frame.get("filename"), str) else []
        if found := [*files, *paths, *named]:
            return str(found[0])
    return ""


def _frames(traceback: TracebackType | None) -> Iterator[dict[str, Any]]:
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
