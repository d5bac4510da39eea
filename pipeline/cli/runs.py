"""The commands config, train, evaluate and track: one run, from its config to its results on the server."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from pipeline.cli.options import (
    FAILED,
    INTERRUPTED,
    OK,
    add_command,
    add_config_arguments,
    count,
    share,
    strength,
    whole,
)
from pipeline.config.yaml_file import dump_yaml


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    _add_train(commands)
    _add_evaluate(commands)
    _add_track(commands)
    _add_config(commands)


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        run_train,
        "train a model; the same command continues an interrupted run (which exits with 130)",
        "selora train configs/own_data.yaml adapter.rank=16 gate.lam=0.5",
        "torchrun --nproc-per-node 8 -m pipeline train configs/own_data.yaml",
        "deepspeed --module pipeline train configs/own_data.yaml",
    )
    add_config_arguments(parser)


def run_train(arguments: argparse.Namespace) -> int:
    from pipeline.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch, so that a typo is reported at once
    from pipeline.evaluation.datasets.overlap import check_overlap

    check_overlap(config)
    from pipeline.training.run import train

    return OK if train(config).finished else INTERRUPTED


def _add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        run_evaluate,
        "evaluate a run or a model on a benchmark: zero-shot accuracy, retrieval, K-NN; finished datasets are skipped",
        "selora evaluate runs/my_run --benchmark benchmark.yaml",
        "selora evaluate ViT-B-16-quickgelu --pretrained openai --benchmark paper --root /data/eval",
        "selora evaluate runs/my_run --strength",
        "selora evaluate runs/my_run --strength auto --floor 0.95",
    )
    _add_model_arguments(parser)
    _add_work_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the models and datasets to evaluate."""
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="directory of a run, or a name as in model.name")
    parser.add_argument("--pretrained", metavar="TAG", help="open_clip tag or weights file of a plain model")
    parser.add_argument("--base", metavar="PATH", help="new place of the run's base, if it has moved")
    parser.add_argument(
        "--benchmark", metavar="NAME", help="paper, quick, vision, wds or a YAML file (default: the run's own)"
    )
    parser.add_argument("--root", metavar="DIR", help="root of the benchmark's datasets: a directory, URL or hf:ORG")
    parser.add_argument(
        "--strength",
        nargs="*",
        type=strength,
        metavar="A",
        help="one number: the model at this strength, between the untouched (0) and the fine-tuned (1); auto: at the "
        "largest that keeps the floor, chosen on other images than it is reported on; several, or none: the curve "
        "(default: 0 0.1 .. 1)",
    )
    parser.add_argument(
        "--floor",
        type=share,
        metavar="SHARE",
        help="share kept that --strength auto looks for (default: promote.min_kept, promote.max_forgetting)",
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="compare all checkpoints of the run by the group id, and evaluate the best one",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: RUN/eval, or eval/MODEL)")
    parser.add_argument("--datasets", nargs="+", metavar="KEY", help="evaluate only these datasets of the benchmark")
    parser.add_argument(
        "--limit",
        type=count,
        metavar="N",
        help="use only N images of each dataset, evenly spaced, and the same share of a K-NN bank",
    )


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for how the work is done."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: this rank's GPU if there is one)"
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="images per rank (default: the run's, or 64, on a GPU 512)"
    )
    parser.add_argument(
        "--workers",
        type=whole,
        metavar="N",
        help="decoding processes per rank (default: the run's, or 2, on a GPU up to 12)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="precision of the activations (default: the run's eval.precision, or fp32)",
    )
    parser.add_argument(
        "--preprocessing",
        choices=("reference", "fast"),
        default="reference",
        help="reference: PIL, for published numbers (default)",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR|off",
        help="where decoded images are kept for the next model (default: the run's, or SELORA_CACHE, ~/.cache/selora)",
    )


def run_evaluate(arguments: argparse.Namespace) -> int:
    from pipeline.evaluation.command import EvalRequest, evaluate_command
    from pipeline.evaluation.strength import ALPHAS

    options = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(EvalRequest)}
    if arguments.strength == []:
        options["strength"] = ALPHAS
    if arguments.base is not None:
        from pipeline.model.restore import move_base

        move_base(arguments.model, arguments.base)
    return evaluate_command(arguments.model, EvalRequest(**options))


def _add_track(commands: Any) -> None:
    parser = add_command(
        commands,
        "track",
        run_track,
        "upload the journal entries of runs that are missing from MLflow",
        "selora track sync runs/my_run",
        "selora track sync runs --uri http://tracking:5000",
    )
    parser.add_argument("action", choices=("sync",), help="sync: replay the journals; nothing is stored twice")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run, or of several runs")
    parser.add_argument("--uri", help="MLflow tracking server or database (default: each run's own)")
    parser.add_argument("--full", action="store_true", help="upload everything again, for a store that has lost data")


def run_track(arguments: argparse.Namespace) -> int:
    from pipeline.tracking.mlflow.sync import sync_all

    reports = sync_all(arguments.runs, arguments.uri, full=arguments.full)
    for report in reports:
        print(report)
    return OK if all(report.complete for report in reports) else FAILED


def _add_config(commands: Any) -> None:
    parser = add_command(
        commands,
        "config",
        run_config,
        "print the resolved config and where each value came from",
        "selora config configs/own_data.yaml train.lr=3e-5",
        text_only=True,
    )
    add_config_arguments(parser)


def run_config(arguments: argparse.Namespace) -> int:
    from pipeline.config import digest, flatten, load_config_with_origin

    config, origins = load_config_with_origin(arguments.config, arguments.overrides)
    lines: list[tuple[str, str]] = []
    section = ""
    for key, value in flatten(config).items():
        above, _, name = key.rpartition(".")
        if above != section:
            lines.append((f"{above}:", ""))
            section = above
        text = value if isinstance(value, str) and value.startswith("[") else dump_yaml(value).splitlines()[0]
        lines.append((f"{'  ' if above else ''}{name}: {text}", origins[key]))
    width = min(60, max(len(text) for text, _ in lines))
    for text, origin in lines:
        print(f"{text:<{width}}  # {origin}" if origin else text)
    print(f"# digest {digest(config)}")
    return OK
