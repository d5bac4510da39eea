"""The command doctor: check a machine, a launch, or the data of a benchmark."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import FAILED, OK, add_command
from pipeline.config import ConfigError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.doctor.findings import Finding


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
        const="",
        metavar="MODEL",
        help="evaluate this untouched CLIP (default: OpenAI's ViT-B/16) and compare with published results",
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
        return _benchmark(arguments)
    config = None if arguments.config is None else load_config(arguments.config, arguments.overrides)
    return _launch(config) if arguments.launch else _machine(config)


def _machine(config: Config | None) -> int:
    from pipeline.doctor.machine import check_config, check_machine

    return _print([*check_machine(config), *(check_config(config) if config is not None else ())])


def _launch(config: Config | None) -> int:
    from pipeline.doctor.launch import check_launch

    if config is None:
        raise ConfigError("--launch: give a CONFIG; the ranks check its shared path, shards and tracking server")
    findings = check_launch(config)
    if os.environ.get("RANK", "0") == "0":
        return _print(findings)
    return OK if all(each.ok for each in findings) else FAILED


def _benchmark(arguments: argparse.Namespace) -> int:
    from pipeline.doctor.benchmark import check_rows, reproduce, required_rows
    from pipeline.evaluation.datasets.benchmark import Benchmark, load_benchmark, needs_root

    if arguments.root is None and arguments.golden is None and needs_root(arguments.benchmark):
        return _print(required_rows(load_benchmark(arguments.benchmark, ".").rows))
    benchmark = load_benchmark(arguments.benchmark, arguments.root)
    findings = []
    for each in check_rows(benchmark.rows):
        findings.append(each)
        if each.checked:
            print(f"checked {each.name}", file=sys.stderr)
    code = _print(findings)
    if arguments.golden is None:
        return code
    ready = {each.name for each in findings if each.checked and each.ok}
    rows = tuple(row for row in benchmark.rows if row.key in ready)
    if not rows:
        raise ConfigError("--golden: no dataset is ready, so there is nothing to compare")
    compared = reproduce(Benchmark(benchmark.name, rows), arguments.golden, arguments.pretrained, arguments.out)
    return max(code, _print(compared))


def _print(findings: Iterable[Finding]) -> int:
    from pipeline.doctor.findings import format_findings

    findings = list(findings)
    print(format_findings(findings))
    return OK if all(each.ok for each in findings) else FAILED
