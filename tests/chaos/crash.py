"""A file layer that fails: work in a child that dies, or meets an error of the disk, at its n-th call, for every n.

The interpreter reports each opening, renaming, removing and making of a file to its audit hooks before it does it, and
what cannot be reported (fsync, and what safetensors writes in Rust) is wrapped. So to die before call n is to die after
call n - 1, and all moments between two changes of the disk are tried.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_EVENTS = frozenset(
    ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "fcntl.flock")
)
DIED, DONE, REFUSED = 77, 0, 1


class Layer:
    """Counts the calls that concern files below ``root``, and fails at one of them."""

    def __init__(self, root: Path, at: int, fail: Callable[[], None]) -> None:
        self.root, self.at, self.fail, self.calls = os.fspath(root), at, fail, 0

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        # Inside of a folder that is removed as a whole, names are relative to an open folder.
        if event in _EVENTS and (not isinstance(args[0], str | bytes | Path) or not _is_outside(args[0], self.root)):
            self.tick()

    def tick(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.fail()

    def install(self) -> None:
        sys.addaudithook(self.hook)
        fsync = os.fsync

        def counted(fd: int) -> None:
            self.tick()
            fsync(fd)

        os.fsync = counted


def _is_outside(name: Any, root: str) -> bool:
    path = os.fspath(name)
    path = os.fsdecode(path)
    return os.path.isabs(path) and not path.startswith(root)


def _die() -> None:
    os._exit(DIED)


def _io_error(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def attempt(work: Callable[[Layer], object], root: Path, at: int, number: int | None = None) -> int:
    """Run ``work`` in a child whose call ``at`` kills it, or raises the error ``number``.

    Returns:
        DIED, DONE, or REFUSED when an error left the work; what it was is on stderr.
    """
    pid = os.fork()
    if pid == 0:
        code = DONE
        try:
            layer = Layer(root, at, _die if number is None else _io_error(number))
            layer.install()
            work(layer)
        except BaseException:  # noqa: BLE001 - what it was is printed, and told by the code
            traceback.print_exc()
            code = REFUSED
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def every_crash(
    work: Callable[[Layer], object], fresh: Callable[[], Path], numbers: tuple[int | None, ...] = (None, errno.EIO)
) -> Iterator[tuple[Path, str]]:
    """Each way in which ``work`` can break off: the folder that is left, and what was done to it.

    Args:
        work: called with the layer, in a child; it changes the folder that ``fresh`` made last.
        fresh: a folder as it was before.
        numbers: errors to raise, None to kill.

    Yields:
        After each attempt, one for every call that the undisturbed work makes.
    """
    calls = _calls(work, fresh())
    assert calls > 0, "the work touches no file"
    for number in numbers:
        for at in range(1, calls + 1):
            root = fresh()
            code = attempt(work, root, at, number)
            assert code != DONE or number is not None, f"call {at} of {calls} did not come"
            yield root, f"{'killed before' if number is None else errno.errorcode[number] + ' at'} call {at} of {calls}"


def _calls(work: Callable[[Layer], object], root: Path) -> int:
    """How many calls the undisturbed work makes."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        layer = Layer(root, -1, _die)
        layer.install()
        work(layer)
        os.write(write, str(layer.calls).encode())
        os._exit(DONE)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as told:
        return int(told.read())
