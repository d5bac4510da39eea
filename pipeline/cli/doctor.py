"""The command doctor: what this machine, a config and a benchmark's data lack, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import FAILED, OK, add_command
from pipeline.config import ConfigError

if TYPE_CHECKING:
    from pipeline.config import Config

GIB = 2**30
# The model of the paper; its published numbers are in the rows of the benchmark.
GOLDEN_MODEL, GOLDEN_TAG = "ViT-B-16-quickgelu", "openai"
NEEDED_DISK_GIB, NEEDED_SHM_GIB = 10, 1


@dataclass(frozen=True)
class Finding:
    """One result of a check. `todo` says what to do about it, and is empty if all is well."""

    what: str
    said: str
    todo: str = ""


def add(commands: Any) -> None:
    """Declare the command of this file."""
    parser = add_command(
        commands,
        "doctor",
        run_doctor,
        "check this machine, and optionally a config, a launch or the data of a benchmark",
        "selora doctor",
        "selora doctor configs/own_data.yaml data.train=shards",
        "selora doctor --benchmark paper --root /data/eval",
        "selora doctor --benchmark paper --root /data/eval --golden",
        "srun --ntasks-per-node=1 torchrun … --no-python selora doctor configs/own_data.yaml --launch",
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file; check its shards, directories and tracking server"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options that replace those of the file"
    )
    parser.add_argument(
        "--launch",
        action="store_true",
        help="check all ranks of a launch together; start it in the same way as `selora train`",
    )
    parser.add_argument("--benchmark", metavar="NAME", help="paper, quick, vision, wds or a YAML file; check its data")
    parser.add_argument("--root", metavar="DIR", help="root of the benchmark's datasets: a directory, URL or hf:ORG")
    parser.add_argument(
        "--golden",
        nargs="?",
        const=GOLDEN_MODEL,
        metavar="MODEL",
        help=f"evaluate this untouched CLIP (default: {GOLDEN_MODEL}, {GOLDEN_TAG}) and compare with published results",
    )
    parser.add_argument("--pretrained", metavar="TAG", help="open_clip tag or weights file of --golden")
    parser.add_argument(
        "--out", type=Path, default=Path("eval/golden"), metavar="DIR", help="directory for the results of --golden"
    )


def run_doctor(arguments: argparse.Namespace) -> int:
    from pipeline.config import load_config

    if arguments.benchmark is None and (arguments.root is not None or arguments.golden is not None):
        raise ConfigError("--root and --golden belong to a benchmark: name it with --benchmark")
    if arguments.benchmark is not None:
        return _look_at_benchmark(arguments)
    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    if arguments.launch:
        return _look_at_launch(config)
    findings = list(_machine(config))
    if config is not None:
        findings += _config(config)
    for each in findings:
        print(
            f"{'!!' if each.todo else 'ok'}  {each.what:10} {each.said}" + (f"\n      {each.todo}" if each.todo else "")
        )
    return FAILED if any(each.todo for each in findings) else OK


def _look_at_launch(config: Config | None) -> int:
    from pipeline.doctor.launch import check_launch

    if config is None:
        raise ConfigError("--launch: give a CONFIG; the ranks check its shared path, shards and tracking server")
    findings = check_launch(config)
    if os.environ.get("RANK", "0") == "0":
        for each in findings:
            print(f"{'ok' if each.ok else '!!'}  {each.name:11} {each.text}")
    return OK if all(each.ok for each in findings) else FAILED


def _look_at_benchmark(arguments: argparse.Namespace) -> int:
    from pipeline.doctor.benchmark import expected, format_inspection, inspect_benchmark
    from pipeline.evaluation.datasets.benchmark import Benchmark, load_benchmark, needs_root

    if arguments.root is None and arguments.golden is None and needs_root(arguments.benchmark):
        rows = load_benchmark(arguments.benchmark, ".").rows
        print(format_inspection([expected(row) for row in rows], looked=False))
        return OK
    benchmark = load_benchmark(arguments.benchmark, arguments.root)
    found = []
    for each in inspect_benchmark(benchmark):
        found.append(each)
        print(f"checked {each.row.key}", file=sys.stderr)
    print(format_inspection(found))
    ready = [each.row for each in found if each.fault is None]
    code = OK if len(ready) == len(found) else FAILED
    if arguments.golden is None:
        return code
    if not ready:
        raise ConfigError("--golden: no dataset is ready, so there is nothing to compare")
    return max(code, _golden(Benchmark(benchmark.name, tuple(ready)), arguments))


def _golden(benchmark: Any, arguments: argparse.Namespace) -> int:
    from pipeline.data.storage.cache import Cache
    from pipeline.doctor.benchmark import compare_with_published, format_comparison
    from pipeline.evaluation.command import find_device, load_plain, progress
    from pipeline.evaluation.datasets.dataset import Settings
    from pipeline.evaluation.run import evaluate

    tag = arguments.pretrained or (GOLDEN_TAG if arguments.golden == GOLDEN_MODEL else None)
    clip = load_plain(arguments.golden, tag)
    settings = Settings(device=find_device(None), cache=Cache.named(None))
    outcome = evaluate(clip, benchmark, arguments.out, settings, say=progress)
    compared = compare_with_published(benchmark, outcome.results)
    print(format_comparison(compared))
    return OK if all(each.agrees for each in compared) else FAILED


def _machine(config: Config | None) -> Iterator[Finding]:
    from pipeline.data.storage.cache import cache_directory

    yield _versions()
    yield _accelerator()
    yield _backends()
    yield _shared_memory()
    yield _disk("disk", Path(config.out if config is not None else "."))
    yield _disk("cache", cache_directory())
    yield _tracking(config)


def _versions() -> Finding:
    """Every required package, and its version against the required one."""
    from packaging.requirements import Requirement

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
            wrong.append(f"{needed.name} is {version}, wanted {needed.specifier}")
    said = f"Python {sys.version.split()[0]}, selora {importlib.metadata.version('selora')}"
    said += f", torch {importlib.metadata.version('torch')}"
    return Finding("versions", said, f"{'; '.join(wrong)}: run `make env`" if wrong else "")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        said = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards)
        old = [card.name for card in cards if card.major < 8]
        todo = f"{', '.join(old)} has no bf16: use model.precision=fp32" if old else ""
        return Finding("GPU", f"{len(cards)}: {said}", todo)
    if Path("/proc/driver/nvidia").exists():
        todo = (
            f"there is a driver, but torch {torch.__version__} sees no GPU: install the torch build of its CUDA version"
        )
        return Finding("GPU", "none that torch sees", todo)
    return Finding("GPU", f"none; {os.cpu_count()} CPU cores, enough for the demo and for small data")


def _backends() -> Finding:
    import torch
    import torch.distributed as dist

    there = [name for name in ("nccl", "gloo") if dist.is_available() and dist.is_backend_available(name)]
    wanted = "nccl" if torch.cuda.is_available() else "gloo"
    todo = "" if wanted in there else f"no {wanted}: ranks cannot communicate; install a torch build that has it"
    return Finding("backends", ", ".join(there) or "none", todo)


def _shared_memory() -> Finding:
    """Loader processes pass their batches through shared memory; containers often have 64 MB."""
    place = Path("/dev/shm")
    if not place.exists():
        return Finding("shm", "no /dev/shm on this system")
    total = shutil.disk_usage(place).total / GIB
    todo = "" if total >= NEEDED_SHM_GIB else "too small for loader processes: docker run --ipc=host, or data.workers=0"
    return Finding("shm", f"{total:.1f} GiB", todo)


def _disk(what: str, folder: Path) -> Finding:
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(above, os.W_OK):
        return Finding(what, str(folder), f"{above} is not writable: choose another directory, or get permission")
    free = shutil.disk_usage(above).free / GIB
    todo = (
        ""
        if free >= NEEDED_DISK_GIB
        else f"less than {NEEDED_DISK_GIB} GiB: free some space, or checkpoints will not fit"
    )
    return Finding(what, f"{folder.absolute()}: {free:.0f} GiB free", todo)


def _tracking(config: Config | None) -> Finding:
    from urllib.error import URLError
    from urllib.request import urlopen

    from pipeline.passwords import redact
    from pipeline.tracking.mlflow.uris import resolve_uri, sqlite_path, without_user

    out = Path(config.out if config is not None else "runs")
    try:
        uri = resolve_uri(config.tracking.uri if config is not None else None, out)
    except ConfigError as error:
        return Finding("tracking", "no usable address", str(error))
    if sqlite_path(uri) is not None or not uri.startswith("http"):
        return Finding("tracking", redact(uri))
    try:
        with urlopen(f"{without_user(uri)}/health", timeout=5) as answer:  # noqa: S310 - resolve_uri let http only pass
            return Finding("tracking", f"{redact(uri)} answers ({answer.status})")
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        todo = f"no answer ({reason}): start it, or train anyway and run `selora track sync` later"
        return Finding("tracking", redact(uri), todo)


def _config(config: Config) -> Iterator[Finding]:
    from pipeline.data.shards.index import load_index
    from pipeline.evaluation.datasets.benchmark import load_benchmark

    try:
        index = load_index(config.data.train)
        said = f"{config.data.train}: {index.samples} samples in {len(index.shards)} shards"
        yield Finding("shards", said + "; `selora verify` reads them all")
    except ConfigError as error:
        yield Finding("shards", config.data.train, str(error))
    if config.eval.benchmark is not None:
        try:
            benchmark = load_benchmark(config.eval.benchmark, config.eval.root).choose(config.eval.datasets)
            benchmark.check_paths()
            yield Finding("benchmark", f"{benchmark.name}: {len(benchmark.rows)} datasets are there")
        except ConfigError as error:
            more = f"{error}; `selora doctor --benchmark {config.eval.benchmark}` has the details"
            yield Finding("benchmark", config.eval.benchmark, more)
