"""Checks of a launch: all ranks check the cluster together, in half a minute.

torchrun … --no-python selora doctor CONFIG --launch       on every node, as `selora train` would be started
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Config, ConfigError
from pipeline.data.shards.index import load_index
from pipeline.doctor.findings import Finding
from pipeline.doctor.machine import server_fault
from pipeline.files import replace_text
from pipeline.passwords import redact
from pipeline.training.cluster.distributed import World, read_world
from pipeline.training.cluster.peers import meet
from pipeline.training.engine import start_process_group

_PACKAGES = ("selora", "torch", "deepspeed", "open_clip_torch", "webdataset", "ray", "mlflow")
_BANDWIDTH_BYTES = 2**24
_SHM_PER_RANK = 2**30
_SKEW_SECONDS = 1.0
_RENAMES_SECONDS = 1.0


@dataclass(frozen=True)
class Cluster:
    """The ranks that met."""

    world: World
    control: dist.ProcessGroup

    def gather(self, own: Any) -> list[Any]:
        """`own` of all ranks, in rank order, on every rank."""
        found: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(found, own, group=self.control)
        return found


def check_launch(config: Config, timeout_s: float = 30.0) -> list[Finding]:
    """Run all checks on all ranks, which return the same findings. Collective.

    Raises PeerLost with the missing ranks unless all arrive within `timeout_s`.
    """
    world, timeout = read_world(), timedelta(seconds=timeout_s)
    control = start_process_group(world, timeout, meet(world, timeout))
    cluster = Cluster(world, control)
    return [check(cluster, config) for check in _CHECKS]


def _ranks(cluster: Cluster, _: Config) -> Finding:
    hosts = cluster.gather(cluster.world.host)
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    devices = sorted({device.type for device in cluster.gather(cluster.world.device)})
    listed = ", ".join(f"{host} ({count})" for host, count in counts.items())
    todo = "" if len(devices) == 1 else "give all ranks the same kind of device"
    return Finding("ranks", f"{len(hosts)} ranks on {listed}; devices: {', '.join(devices)}", todo)


def _versions(cluster: Cluster, _: Config) -> Finding:
    own = {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}}
    everybody = cluster.gather((cluster.world.host, own))
    differing = [
        f"{name}: " + ", ".join(dict.fromkeys(f"{versions[name]} on {host}" for host, versions in everybody))
        for name in own
        if len({versions[name] for _, versions in everybody}) > 1
    ]
    if differing:
        return Finding("versions", "; ".join(differing), "give all nodes the environment of uv.lock")
    return Finding("versions", ", ".join(f"{name} {version}" for name, version in own.items()))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _bandwidth(cluster: Cluster, _config: Config) -> Finding:
    world = cluster.world
    if world.world_size == 1:
        return Finding("collectives", "one rank: nothing to measure")
    big = torch.zeros(_BANDWIDTH_BYTES // 4, device=world.device)
    small = torch.zeros(1, device=world.device)
    dist.all_reduce(big)  # the first one opens the connections
    seconds = _seconds(lambda: dist.all_reduce(big), 3, world)
    latency = _seconds(lambda: dist.all_reduce(small), 20, world)
    rate = 2 * (world.world_size - 1) / world.world_size * _BANDWIDTH_BYTES / seconds / 1e9
    text = f"{rate:.2f} GB/s per rank in an all-reduce, {latency * 1e3:.2f} ms for a small one"
    return Finding("collectives", text)


def _seconds(work: Callable[[], Any], times: int, world: World) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def _clocks(cluster: Cluster, _config: Config) -> Finding:
    # The exchange itself takes time that looks like skew, so the smallest of several tries is used.
    tries = []
    for _ in range(5):
        dist.barrier(cluster.control)
        tries.append(cluster.gather(time.time()))
    skew = min(max(times) - min(times) for times in tries)
    todo = "start an NTP service" if skew >= _SKEW_SECONDS else ""
    return Finding("clocks", f"clocks agree within {skew * 1e3:.0f} ms", todo)


def _shared_path(cluster: Cluster, config: Config) -> Finding:
    """Check that all ranks can read files of rank 0, and never see a half-replaced file."""
    world, out = cluster.world, Path(config.out).absolute()
    name = cluster.gather(uuid.uuid4().hex)[0]
    path, fault = out / f".doctor-{name}", ""
    try:
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)
            replace_text(path, "0\n" * 1000)
    except OSError as error:
        fault = f"cannot be written: {error.strerror}"
    dist.barrier(cluster.control)
    try:
        if world.is_main and not fault:
            _rename_for_a_while(path)
        elif not world.is_main:
            fault = _read_for_a_while(path)
    except FileNotFoundError:
        fault = "is not shared: a file written by rank 0 is missing"
    except OSError as error:
        fault = f"{error.strerror}"
    faults = {host: text for host, text in cluster.gather((world.host, fault)) if text}
    if world.is_main:
        path.unlink(missing_ok=True)
    if faults:
        listed = "; ".join(f"on {host} {text}" for host, text in faults.items())
        return Finding("shared path", f"out={out} {listed}", "put `out` on a file system that all nodes share")
    return Finding("shared path", f"out={out} is shared and replaces files atomically")


def _rename_for_a_while(path: Path) -> None:
    end, number = time.monotonic() + _RENAMES_SECONDS, 0
    while time.monotonic() < end:
        number += 1
        replace_text(path, f"{number}\n" * 1000)


def _read_for_a_while(path: Path) -> str:
    end = time.monotonic() + _RENAMES_SECONDS
    while time.monotonic() < end:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) != 1000 or len(set(lines)) != 1:
            return "shows files half written"
    return ""


def _shm(cluster: Cluster, _: Config) -> Finding:
    world = cluster.world
    total = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    small = {
        host: size
        for host, size, ranks in cluster.gather((world.host, total, world.local_world_size))
        if size < ranks * _SHM_PER_RANK
    }
    if small:
        listed = ", ".join(f"{host}: {size / 2**20:.0f} MiB" for host, size in small.items())
        return Finding("shm", f"/dev/shm is small: {listed}", "mount a memory-backed one of 1 GiB per rank or more")
    return Finding("shm", "/dev/shm has 1 GiB per rank or more everywhere")


def _shards(cluster: Cluster, config: Config) -> Finding:
    try:
        own = load_index(config.data.train).digest
        fault = ""
    except (ConfigError, OSError) as error:
        own, fault = "", str(error)
    everybody = cluster.gather((cluster.world.host, own, fault))
    faults = dict.fromkeys(f"{host}: {text}" for host, _, text in everybody if text)
    if faults:
        return Finding("shards", f"data.train={config.data.train}", "; ".join(faults))
    if len({found for _, found, _ in everybody}) > 1:
        text = f"data.train={config.data.train} is not the same on all hosts"
        return Finding("shards", text, "copy the same shards to every host, or put them on a shared file system")
    return Finding("shards", f"data.train={config.data.train} is the same everywhere ({own[:12]})")


def _tracking(cluster: Cluster, config: Config) -> Finding:
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not config.tracking.enabled or not uri.startswith("http"):
        return Finding("tracking", "no server: runs are tracked in a file below `out`")
    everybody = cluster.gather((cluster.world.host, server_fault(uri)))
    faults = dict.fromkeys(f"from {host}: {text}" for host, text in everybody if text)
    if faults:
        todo = "start the server, or train anyway: the journal keeps everything for `selora track sync`"
        return Finding("tracking", f"{redact(uri)} does not answer {'; '.join(faults)}", todo)
    return Finding("tracking", f"{redact(uri)} answers on every host")


def _ray(cluster: Cluster, _: Config) -> Finding:
    if "RAY_ADDRESS" not in os.environ:
        return Finding("ray", "RAY_ADDRESS is not set: no Ray cluster to check")
    own = os.environ.get("RAY_AUTH_MODE") == "token"
    open_hosts = dict.fromkeys(host for host, closed in cluster.gather((cluster.world.host, own)) if not closed)
    if open_hosts:
        todo = "set RAY_AUTH_MODE=token, or anyone can run code there"
        return Finding("ray", f"no token authentication on {', '.join(open_hosts)}", todo)
    return Finding("ray", "token authentication is on")


_CHECKS: Iterable[Callable[[Cluster, Config], Finding]] = (
    _ranks,
    _versions,
    _bandwidth,
    _clocks,
    _shared_path,
    _shm,
    _shards,
    _tracking,
    _ray,
)
