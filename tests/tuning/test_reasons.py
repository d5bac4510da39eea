"""Ray's errors, copied from a real sweep, and the line that a user gets for each."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError
from pipeline.tuning.cluster.ray_errors import reason_behind

RESET = "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:10648: Connection reset by peer. This is typically"
KILLED = (
    "A worker health check failed.\nWorker info: Worker(\n  actor=Actor(RayTrainWorker, 44482be9),\n)\n"
    "The actor died unexpectedly before finishing this task.\n\tpid: 5521\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called."
)
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
            Wrapper(
                "Training failed due to worker errors:\n[Rank 0 Error Snippet]:\nTraceback",
                worker_failures={0: RuntimeError(RESET), 1: Wrapper(KILLED, health_check_failure=Exception(KILLED))},
            ),
            "rank 1: its process was killed, or it ran out of memory "
            "(Worker unexpectedly exits with a connection error code 2. End of file)",
        ),
        (
            Wrapper("Training failed due to worker errors:", worker_failures={0: RuntimeError(RESET)}),
            f"rank 0: RuntimeError: {RESET}",
        ),
        (
            Wrapper("Training failed due to controller error:\n", controller_failure=TimeoutError("no answer in 30 s")),
            "TimeoutError: no answer in 30 s",
        ),
        (
            Wrapper("ray::_evaluate_here() (pid=7)\n  File", cause=ConfigError("eval/own: there is no such folder")),
            "eval/own: there is no such folder",
        ),
        (Exception(LOW), "out of memory: Ray ended a process, the node was running low on memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: DefaultCPUAllocator: can't"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_line_tells_the_cause_and_not_rays_headline(error: Exception, line: str) -> None:
    assert reason_behind(error).startswith(line)
