"""Ray's errors, copied from a real sweep, and the line that a user gets for each."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError
from pipeline.tuning.cluster.ray_errors import Died, Failed, RanksFailed, reason_behind

RESET = "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:10648: Connection reset by peer. This is typically"
KILLED = (
    "The worker died unexpectedly while executing this task. Check python-core-worker-*.log files for more\n"
    "information. The worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called."
)
ENDED = (
    "its process was killed, or it ran out of memory "
    "(Worker unexpectedly exits with a connection error code 2. End of file)"
)
SIGNAL = "its process was killed, or it ran out of memory (signal 9)"
LOW = (
    "Task was killed due to the node running low on memory.\nMemory on the node (IP: 127.0.0.1, ID: 1) where the task "
    "was running was 22.9GB / 23.5GB (0.97), which exceeds the memory usage threshold of 0.95."
)


class Wrapper(Exception):
    """As Ray's: a headline, and the cause in an attribute."""

    def __init__(self, headline: str, **inside: object) -> None:
        super().__init__(headline)
        self.__dict__ |= inside


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RanksFailed({0: Failed(f"RuntimeError: {RESET}"), 1: Wrapper("ray::_rank() (pid=7)", cause=Died(SIGNAL))}),
            f"rank 1: {SIGNAL}",
        ),
        (RanksFailed({0: Failed(f"RuntimeError: {RESET}"), 1: Exception(KILLED)}), f"rank 1: {ENDED}"),
        (RanksFailed({0: Failed(f"RuntimeError: {RESET}")}), f"rank 0: RuntimeError: {RESET}"),
        (
            Wrapper("ray::_rank() (pid=7)\n  File", cause=ConfigError("eval/own: there is no such folder")),
            "eval/own: there is no such folder",
        ),
        (Exception(LOW), "out of memory: Ray ended a process, the node was running low on memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: DefaultCPUAllocator: can't"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_line_tells_the_cause_and_not_rays_headline(error: Exception, line: str) -> None:
    assert reason_behind(error).startswith(line)
