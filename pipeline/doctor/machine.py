"""Checks of this machine, and of the shards and the benchmark that a config names."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from pipeline.config import Config, ConfigError
from pipeline.data.shards.index import load_index
from pipeline.data.storage.cache import cache_directory
from pipeline.doctor.findings import Finding
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.passwords import redact
from pipeline.tracking.mlflow.uris import resolve_uri, without_user

_GIB = 2**30
_NEEDED_DISK_GIB, _NEEDED_SHM_GIB = 10, 1
_REQUEST_SECONDS = 5.0


def check_machine(config: Config | None) -> Iterator[Finding]:
    """Check this machine for a run with `config`, or for any run."""
    yield _versions()
    yield _accelerator()
    yield _backends()
    yield _shared_memory()
    yield _disk("disk", Path(config.out if config is not None else "."))
    yield _disk("cache", cache_directory())
    yield check_tracking(config)


def check_config(config: Config) -> Iterator[Finding]:
    """Check the shards and the benchmark of a config."""
    try:
        index = load_index(config.data.train)
        text = f"{config.data.train}: {index.samples} samples in {len(index.shards)} shards"
        yield Finding("shards", text + "; `selora verify` reads them all")
    except ConfigError as error:
        yield Finding("shards", config.data.train, str(error))
    if config.eval.benchmark is not None:
        try:
            benchmark = load_benchmark(config.eval.benchmark, config.eval.root).choose(config.eval.datasets)
            benchmark.check_paths()
            yield Finding("benchmark", f"{benchmark.name}: {len(benchmark.rows)} datasets found")
        except ConfigError as error:
            todo = f"{error}; `selora doctor --benchmark {config.eval.benchmark}` has the details"
            yield Finding("benchmark", config.eval.benchmark, todo)


def _versions() -> Finding:
    """Every required package, and its version against the required one."""
    wrong = []
    for text in importlib.metadata.requires("selora") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue  # belongs to an extra
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} is {version}, required {needed.specifier}")
    text = f"Python {sys.version.split()[0]}, selora {importlib.metadata.version('selora')}"
    text += f", torch {importlib.metadata.version('torch')}"
    return Finding("versions", text, f"{'; '.join(wrong)}: run `make env`" if wrong else "")


def _accelerator() -> Finding:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(f"{card.name} {card.total_memory / _GIB:.0f} GiB" for card in cards)
        old = [card.name for card in cards if card.major < 8]
        todo = f"{', '.join(old)} has no bf16: use model.precision=fp32" if old else ""
        return Finding("GPU", f"{len(cards)}: {text}", todo)
    if Path("/proc/driver/nvidia").exists():
        todo = f"install the torch build for the driver's CUDA version: torch {torch.__version__} sees no GPU"
        return Finding("GPU", "there is a driver, but torch sees no GPU", todo)
    return Finding("GPU", f"none; {os.cpu_count()} CPU cores, enough for the demo and for small data")


def _backends() -> Finding:
    found = [name for name in ("nccl", "gloo") if dist.is_available() and dist.is_backend_available(name)]
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    todo = "" if needed in found else f"no {needed}: ranks cannot communicate; install a torch build that has it"
    return Finding("backends", ", ".join(found) or "none", todo)


def _shared_memory() -> Finding:
    """Loader processes pass their batches through shared memory; containers often have 64 MB."""
    place = Path("/dev/shm")
    if not place.exists():
        return Finding("shm", "no /dev/shm on this system")
    total = shutil.disk_usage(place).total / _GIB
    todo = "too small for loader processes: docker run --ipc=host, or data.workers=0"
    return Finding("shm", f"{total:.1f} GiB", todo if total < _NEEDED_SHM_GIB else "")


def _disk(name: str, folder: Path) -> Finding:
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(above, os.W_OK):
        return Finding(name, str(folder), f"{above} is not writable: choose another directory, or get permission")
    free = shutil.disk_usage(above).free / _GIB
    todo = f"less than {_NEEDED_DISK_GIB} GiB: free some space, or checkpoints will not fit"
    return Finding(name, f"{folder.absolute()}: {free:.0f} GiB free", todo if free < _NEEDED_DISK_GIB else "")


def check_tracking(config: Config | None) -> Finding:
    """Whether the tracking server answers from this machine."""
    try:
        uri = resolve_uri(
            config.tracking.uri if config is not None else None, Path(config.out if config is not None else "runs")
        )
    except ConfigError as error:
        return Finding("tracking", "no usable address", str(error))
    if not uri.startswith("http"):
        return Finding("tracking", redact(uri))
    fault = server_fault(uri)
    if not fault:
        return Finding("tracking", f"{redact(uri)} answers")
    todo = f"start the server, or train anyway and run `selora track sync` later ({fault})"
    return Finding("tracking", f"{redact(uri)} does not answer", todo)


def server_fault(uri: str) -> str:
    """Why the MLflow server at an http address does not answer; empty if it does."""
    url = without_user(uri).rstrip("/") + "/health"
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS) as answer:  # noqa: S310 - callers pass only http
            return "" if answer.status == 200 else f"status {answer.status}"
    except urllib.error.HTTPError as error:
        # A server that requires a password does answer.
        return "" if error.code in (401, 403) else f"status {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error))
