"""Sockets between the processes of one machine: no proxy in between, and no path that is too long for an address.

The address of a Unix socket is a path. If TMPDIR is too long for one, as in the directory of a batch system's job,
sockets go to a short directory instead; all other temporary files stay in TMPDIR.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from multiprocessing import util

LONGEST = 107  # bytes of an address
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_OF_WORKERS = len("/pymp-01234567/listener-01234567")


def short_place() -> str | None:
    """A short directory in which directories can be created; None if there is none."""
    return next((place for place in _SHORT if os.access(place, os.W_OK | os.X_OK)), None)


def use_short_sockets() -> None:
    """Let this process and its workers exchange tensors, whatever TMPDIR is; call it before the workers start.

    Torch's loader processes pass tensors through a socket in multiprocessing's directory. If its address is too long, a
    thread of each process fails, and the process that waits for the tensor waits forever.
    """
    place = short_place()
    if place is None or len(os.fsencode(tempfile.gettempdir())) + _OF_WORKERS <= LONGEST:
        return
    before, tempfile.tempdir = tempfile.tempdir, place
    try:
        util.get_temp_dir()  # made once for the process, and removed by it
    finally:
        tempfile.tempdir = before


def reach_loopback(environment: MutableMapping[str, str]) -> None:
    """Bypass proxies for servers of this machine, such as MLflow's and the dashboard of Ray.

    Args:
        environment: where a proxy is set, NO_PROXY and no_proxy get the loopback addresses; libraries read either.
    """
    if not any(environment.get(spelled) for name in _PROXIES for spelled in (name, name.lower())):
        return
    given = ",".join(environment.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    hosts = dict.fromkeys([*filter(None, map(str.strip, given.split(","))), *_LOOPBACK])
    environment.update(dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(hosts)))
