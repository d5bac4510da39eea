"""Connecting to a Ray cluster, or starting one on this machine; ray is imported once its settings are in place."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.tracking.tracker import SHIPPED_VARIABLE
from pipeline.tuning.cluster.environment import kept_back, passed_on, short_sockets
from pipeline.tuning.cluster.ray_errors import check_reachable, reason_behind, token_fault
from pipeline.tuning.grid import Resources
from pipeline.tuning.plan import Capacity, Node

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_OBJECT_STORE_BYTES = 100 * 2**20  # only configs pass through it
_CHANCES = 4  # to start a local cluster
# Of the driver and of the trials' processes: no usage report over the network, our own paths.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_niceness": "0",  # as in `selora train`; with Ray's 15 any other process would starve a trial
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Otherwise a process that reserves no GPU sees all of them and takes the first.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last report, after its evaluation, has no loss
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}


@contextmanager
def cluster(address: str | None, resources: Resources) -> Iterator[Capacity]:
    """Connect to the cluster at `address` or RAY_ADDRESS, or start one on this machine for the block."""
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        check_reachable(address)
        _name_secrets()
    settings = dict(_QUIET)
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        # A token for this cluster only, not in a file: Ray would write one into the home directory.
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if address is None:
        # As Ray does on macOS and Windows: a cluster of one machine uses only the loopback.
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # The processes that keep the servers of forked ranks wait for the next trial.
        settings["RAY_idle_worker_killing_time_threshold_ms"] = "3600000"
    with short_sockets(os.environ) if address is None else nullcontext(), _environment(settings):
        import ray

        _connect(address, resources)
        try:
            yield capacity()
        finally:
            ray.shutdown()


def _name_secrets() -> None:
    names = kept_back(os.environ)
    if names:
        sys.stderr.write(
            f"{', '.join(names)}: set here and not passed to the cluster, because Ray would write them into its logs; "
            "its nodes need their own if trials read from such a store\n"
        )


def _connect(address: str | None, resources: Resources) -> None:
    """Call ray.init, repeatedly for a local cluster, because Ray limits its start to half a minute."""
    import ray

    for chance in reversed(range(_CHANCES)):
        try:
            ray.init(**_init_settings(address, resources))
            return
        except Exception as error:  # Ray raises bare exceptions
            ray.shutdown()
            if address is None and chance:
                continue
            where = "start a Ray cluster on this machine" if address is None else f"use the Ray cluster at {address}"
            raise ConfigError(f"cannot {where}: {token_fault(error) or reason_behind(error)}") from error


def _init_settings(address: str | None, resources: Resources) -> dict[str, Any]:
    environment = passed_on(os.environ) | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(resources.cpus_per_worker)))),
        "PYTHONPATH": os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH")])),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        SHIPPED_VARIABLE: "by the sweep",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": _QUIET["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"],
    }
    if resources.gpus_per_worker:
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else an import that looks for cards leaves none to a fork
    else:
        environment["DS_ACCELERATOR"] = "cpu"
    shared = {"runtime_env": {"env_vars": environment}, "log_to_driver": False, "logging_level": "error"}
    if address is not None:
        return {"address": address, **shared}
    return {
        "address": "local",
        "num_cpus": len(os.sched_getaffinity(0)),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        **shared,
    }


def capacity() -> Capacity:
    """The nodes that are there at this moment."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return Capacity(
        tuple(
            Node(node["NodeID"][:8], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in alive
        )
    )


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of a block, unless the user has set them."""
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
