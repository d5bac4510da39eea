"""Errors as Ray hands them out, the texts copied from a real sweep, and the line that a user gets of each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tuning.reasons import told

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
            "rank 1: its process died, killed by somebody or for want of memory "
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
    assert told(error).startswith(line)


def test_a_cluster_that_asks_for_a_token_is_told_with_the_way_out(tmp_path: Path) -> None:
    """Here Ray refuses itself; that a real cluster does is tested on hosts (tests/launch/test_ray_hosts.py)."""
    code = (
        "from pipeline.config import ConfigError; from pipeline.tuning.grid import Resources\n"
        "from pipeline.tuning.scheduler import cluster\n"
        "try: cluster('127.0.0.1:1', Resources()).__enter__()\n"
        "except ConfigError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "cannot use the Ray cluster at 127.0.0.1:1: the token is missing or not the cluster's"
    )
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in done.stdout
