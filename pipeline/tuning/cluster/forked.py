"""A process of its own for each rank and each evaluation, forked from a server that has done the imports already.

A worker process of Ray keeps the server, so trials that follow each other on it pay for the imports once, and each may
die alone: neither the worker nor the server takes part in a training. The server imports and forks, nothing else: it
starts no threads and touches no card, without which a forked process could not use them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pipeline.tuning.cluster.ray_errors import Died, Failed, reason_behind

# All that a training or an evaluation imports, also late.
PRELOAD = (
    "pipeline.tuning.trial",
    "pipeline.training.run",
    "pipeline.evaluation.auto_strength",
    "pipeline.evaluation.record",
    "deepspeed",
    "open_clip",
    "webdataset",
    "torch.utils.cpp_extension",  # of DeepSpeed, when it builds an engine
)
_CARD_IN_USE = 77  # exit code of a forked process that could not use a card
_LOOK_SECONDS = 1.0


def run_forked(function: Callable[..., object], arguments: tuple[Any, ...], environment: Mapping[str, str]) -> None:
    """Call a function of a module in a process of its own and wait for it.

    The process ends with this one. It is forked, or where the server has touched a card by its imports, started afresh.

    Args:
        environment: all of the process's variables; its working directory is that of this process.

    Raises:
        Died: the process was ended from outside.
        Failed: the function raised.
    """
    for method in ("forkserver", "spawn"):
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(list(PRELOAD))
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(sender, dict(environment), str(Path.cwd()), function, arguments))
        with _without_main():
            process.start()
        sender.close()
        try:
            process.join()
        finally:
            process.kill()
            process.join()
        if process.exitcode != _CARD_IN_USE:
            break
    if process.exitcode:
        if receiver.poll():
            with_reason = _received(receiver)
            if with_reason is not None:
                raise Failed(with_reason)
        raise Died(_ended_by(process.exitcode))


def _received(receiver: Connection) -> str | None:
    """What a process sent before its end; None if it ended first."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def _ended_by(code: int) -> str:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"its process was killed, or it ran out of memory ({how})"


def _enter(
    sender: Connection,
    environment: dict[str, str],
    folder: str,
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="parent", daemon=True).start()
    if "torch" in sys.modules and sys.modules["torch"].cuda._is_in_bad_fork():
        os._exit(_CARD_IN_USE)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, the one who waits is reason_behind
        sender.send(reason_behind(error))
        sys.exit(1)


def _end_with_parent(server: int) -> None:
    """End this process at once when the one that waits for it has ended, or the server that would report its end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not wait([parent.sentinel], _LOOK_SECONDS) and os.getppid() == server:
        pass
    os.kill(os.getpid(), 9)


@contextmanager
def _without_main() -> Iterator[None]:
    """Let a new process start without the main module of this one, which is a script of Ray's."""
    main = sys.modules["__main__"].__dict__
    file = main.pop("__file__", None)
    try:
        yield
    finally:
        if file is not None:
            main["__file__"] = file
