"""Sockets between the processes of one machine: their addresses are paths, and a path may be too long for one.

Where TMPDIR is, as in the directory of a batch system's job, these go to a short directory instead; everything else
that is temporary stays in TMPDIR.
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing import util

LONGEST = 107  # bytes of an address
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_OF_WORKERS = len("/pymp-01234567/listener-01234567")


def short_place() -> str | None:
    """A short directory in which directories can be made, None where there is none."""
    return next((place for place in _SHORT if os.access(place, os.W_OK | os.X_OK)), None)


def use_short_sockets() -> None:
    """Let this process and its workers pass tensors on, whatever TMPDIR; to be called before they start.

    Torch's loader processes hand over tensors by a socket in multiprocessing's directory. With too long an address each
    dies of it in a thread, and the one that waits for the tensor waits for ever.
    """
    place = short_place()
    if place is None or len(os.fsencode(tempfile.gettempdir())) + _OF_WORKERS <= LONGEST:
        return
    before, tempfile.tempdir = tempfile.tempdir, place
    try:
        util.get_temp_dir()  # made once for the process, and removed by it
    finally:
        tempfile.tempdir = before
