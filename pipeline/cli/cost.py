"""The command cost: parameters, compute and latency of a model's blocks, before anything is trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.cli.options import OK, add_command, count


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    parser = add_command(
        commands,
        "cost",
        run_cost,
        "count parameters and multiply-accumulates of a model with blocks, and measure its latency",
        "selora cost ViT-B-16",
        "selora cost ViT-B-16 --rank 16 256 --active 8 --latency 1 32",
        "selora cost runs/my_run",
        text_only=True,
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="directory of a run, or a name as in model.name")
    parser.add_argument("--pretrained", metavar="TAG", help="open_clip tag or weights file of a plain model")
    parser.add_argument("--rank", type=count, nargs="+", metavar="R", help="ranks of the blocks (default: the run's)")
    parser.add_argument("--kind", choices=("lora", "dora"), nargs="+", help="forms of the blocks (default: the run's)")
    parser.add_argument("--active", type=count, metavar="N", help="number of open blocks (default: the run's)")
    parser.add_argument(
        "--latency", type=count, nargs="+", metavar="BATCH", help="time a forward pass at these batch sizes"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="device for --latency: cpu, cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")


def run_cost(arguments: argparse.Namespace) -> int:
    from pipeline.costs.cost_report import cost_report, format_report

    report = cost_report(
        arguments.model,
        pretrained=arguments.pretrained,
        ranks=arguments.rank,
        kinds=arguments.kind,
        active=arguments.active,
        latency_batches=arguments.latency or (),
        device=arguments.device,
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(format_report(report))
    return OK
