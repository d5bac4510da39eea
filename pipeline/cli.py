"""The command line: one function per command, and a stage is imported only when its command is chosen.

No option repeats a key of the config where there is one: what a run computes is said by its config file and key=value,
ranks come from the launcher's environment. No option may be a prefix of one of torchrun's, which accepts abbreviations
over its whole line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config_file import ConfigError, dump_yaml

Command = Callable[[argparse.Namespace], int]

OK, FAILED, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: it failed or found something wrong; 2: the user's mistake, told; 130: Ctrl-C."""
    arguments = build_parser().parse_args(_without_local_rank(sys.argv[1:] if argv is None else argv))
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not arguments.text_only:
            raise
        # `selora config … | head` ends without a word, and Python's own flush at exit must not find the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except ConfigError as error:
        print(f"{_rank()}selora {arguments.command}: {_message(error)}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print(f"{_rank()}interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; building it imports no stage."""
    parser = argparse.ArgumentParser(
        prog="selora",
        description="Fine-tune CLIP on your own images without losing what it knew.",
        epilog="The usual order: inspect, pack, verify, train, evaluate. `selora COMMAND --help` has examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"selora {importlib.metadata.version('selora')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_pack(commands)
    _add_verify(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_track(commands)
    _add_config(commands)
    _add_demo(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        run_inspect,
        "look at images before packing them: format, counts, classes, captions, what is missing",
        "selora inspect photos/",
        text_only=True,
    )
    _add_source(parser)


def run_inspect(arguments: argparse.Namespace) -> int:
    from pipeline.data.formats import inspect

    print(inspect(arguments.source, arguments.format, **_source_options(arguments)))
    return OK


def _add_pack(commands: Any) -> None:
    parser = _command(
        commands,
        "pack",
        run_pack,
        "write images as WebDataset shards with an index.json beside them",
        "selora pack photos/ shards/train",
        "selora pack photos_test/ eval_sets/photos --eval --templates simple",
    )
    _add_source(parser)
    parser.add_argument("out", type=Path, help="directory for the shards, new or empty")
    parser.add_argument("--samples-per-shard", type=_count, metavar="N", help="default: 16 shards, 64 to 5000 each")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order in the shards (default: 0)")
    parser.add_argument(
        "--check", choices=("decode", "none"), default="decode", help="decode every image once (default), or trust them"
    )
    parser.add_argument(
        "--max-unreadable",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="more than this share is an error (default: 0.01)",
    )
    parser.add_argument("--force", action="store_true", help="replace the shards that are there")
    parser.add_argument("--workers", type=_count, default=4, metavar="N", help="decoding threads (default: 4)")
    parser.add_argument("--eval", action="store_true", help="write an evaluation set for a benchmark file instead")
    parser.add_argument("--templates", default="openai", metavar="NAME", help="--eval: how to ask (openai, simple)")


def run_pack(arguments: argparse.Namespace) -> int:
    if arguments.eval:
        return _pack_eval(arguments)
    from pipeline.data.shards import pack

    report = pack(
        arguments.source,
        arguments.out,
        format=arguments.format,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        check=arguments.check,
        max_unreadable=arguments.max_unreadable,
        force=arguments.force,
        workers=arguments.workers,
        **_source_options(arguments),
    )
    for left_out in report.left_out:
        print(f"left out: {left_out}", file=sys.stderr)
    index = report.index
    classes = f", {len(index.classes)} classes" if index.classes else ""
    print(
        f"{index.directory}: {index.samples} samples{classes} in {len(index.shards)} shards, "
        f"{len(report.left_out)} left out"
    )
    return OK


def _pack_eval(arguments: argparse.Namespace) -> int:
    from pipeline.data.wds_layout import pack_eval

    report = pack_eval(
        arguments.source,
        arguments.out,
        format=arguments.format,
        templates=arguments.templates,
        max_unreadable=arguments.max_unreadable,
        force=arguments.force,
        workers=arguments.workers,
        **_source_options(arguments),
    )
    for left_out in report.left_out:
        print(f"left out: {left_out}", file=sys.stderr)
    print(f"{arguments.out}: an evaluation set of {len(report.eval_set)} images, {len(report.left_out)} left out")
    return OK


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        run_verify,
        "check shards against their index: counts, sizes, checksums, and that every image decodes",
        "selora verify shards/train",
        text_only=True,
    )
    parser.add_argument("shards", type=Path, help="directory with index.json")
    parser.add_argument("--no-decode", action="store_true", help="checksums only, without decoding the images")


def run_verify(arguments: argparse.Namespace) -> int:
    from pipeline.data.shards import verify

    report = verify(arguments.shards, decode=not arguments.no_decode)
    print(report)
    return OK if report.ok else FAILED


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        run_train,
        "train by a config; the same command again continues where the run stopped",
        "selora train configs/own_data.yaml adapter.rank=16 gate.lam=0.5",
        "torchrun --nproc-per-node 8 -m pipeline train configs/own_data.yaml",
        "deepspeed --module pipeline train configs/own_data.yaml",
    )
    _add_config_arguments(parser)


def run_train(arguments: argparse.Namespace) -> int:
    from pipeline.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch: a typo is told at once
    from pipeline.training.run import train

    train(config)
    return OK


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        run_evaluate,
        "zero-shot accuracy and retrieval on the datasets of a benchmark, finished ones skipped",
        "selora evaluate runs/my_run --benchmark benchmark.yaml",
        "selora evaluate ViT-B-16-quickgelu --pretrained openai --benchmark benchmark.yaml",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="directory of a run, or a name as in model.name")
    parser.add_argument("--pretrained", metavar="TAG", help="open_clip tag or weights file of a plain model")
    parser.add_argument("--benchmark", type=Path, metavar="FILE", help="YAML list of datasets (default: the run's own)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: RUN/eval, or eval/MODEL)")
    parser.add_argument("--datasets", nargs="+", metavar="KEY", help="only these rows of the benchmark")
    parser.add_argument("--limit", type=_count, metavar="N", help="only N images of each dataset, evenly spaced")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: this rank's GPU, if any)")
    parser.add_argument("--batch-size", type=_count, metavar="N", help="images per rank (default: the run's, or 64)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="decoding processes per rank (default: the run's, or 2)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)")
    parser.add_argument(
        "--preprocessing",
        choices=("reference", "fast"),
        default="reference",
        help="reference: PIL, for published numbers (default)",
    )


def run_evaluate(arguments: argparse.Namespace) -> int:
    from pipeline.evaluation.run import evaluate_command

    return evaluate_command(
        arguments.model,
        benchmark=arguments.benchmark,
        out=arguments.out,
        datasets=arguments.datasets,
        limit=arguments.limit,
        device=arguments.device,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        pretrained=arguments.pretrained,
        precision=arguments.precision,
        preprocessing=arguments.preprocessing,
    )


def _add_track(commands: Any) -> None:
    parser = _command(
        commands,
        "track",
        run_track,
        "send to MLflow what the journals of runs hold and the server has not got",
        "selora track sync runs/my_run",
        "selora track sync runs --uri http://tracking:5000",
    )
    parser.add_argument("action", choices=("sync",), help="sync: replay the journals; nothing is sent twice")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run, or of many")
    parser.add_argument("--uri", help="MLflow tracking server or database (default: each run's own)")
    parser.add_argument("--full", action="store_true", help="deliver everything again, to a store that lost data")


def run_track(arguments: argparse.Namespace) -> int:
    from pipeline.tracking.mlflow_tracker import sync_all

    reports = sync_all(arguments.runs, arguments.uri, full=arguments.full)
    for report in reports:
        print(report)
    return OK if all(report.complete for report in reports) else FAILED


def _add_config(commands: Any) -> None:
    parser = _command(
        commands,
        "config",
        run_config,
        "print the resolved config and where each value came from",
        "selora config configs/own_data.yaml train.lr=3e-5",
        text_only=True,
    )
    _add_config_arguments(parser)


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


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        run_demo,
        "the whole story on the embedded data: fine-tune four ways, evaluate, compare",
        "selora demo",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the fine-tuning (default: 0)")


def run_demo(arguments: argparse.Namespace) -> int:
    from pipeline.demo.run import demo

    demo(arguments.out, arguments.seed)
    return OK


def _command(
    commands: Any, name: str, run: Command, summary: str, *examples: str, text_only: bool = False
) -> argparse.ArgumentParser:
    """A command's parser; `text_only`: it prints and ends, so a closed pipe may end it without a word."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="example:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, text_only=text_only)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options over the file's, as in adapter.rank=16"
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder of class folders, csv/tsv, or COCO captions json")
    parser.add_argument(
        "--format", choices=("auto", "imagefolder", "csv", "coco"), default="auto", help="default: found out by looking"
    )
    parser.add_argument("--classnames", type=Path, metavar="FILE", help="readable class names, one line per class")
    parser.add_argument("--image-column", metavar="NAME", help="csv: column with image paths")
    parser.add_argument("--caption-column", metavar="NAME", help="csv: column with captions")
    parser.add_argument("--class-column", metavar="NAME", help="csv: column with class names")


def _source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "classnames": arguments.classnames,
        "image_column": arguments.image_column,
        "caption_column": arguments.caption_column,
        "class_column": arguments.class_column,
    }


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"should lie between 0 and 1, got {text!r}")
    return value


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """deepspeed's launcher adds --local_rank=N in front of the command; the environment's LOCAL_RANK is what counts."""
    return [argument for argument in argv if not re.fullmatch(r"--local[_-]rank=\d+", argument)]


def _rank() -> str:
    """Every rank finds the same mistake; the others' copies say whose they are."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def _message(error: ConfigError) -> str:
    text = str(error)
    return text if "\n" not in text else "\n  " + text.replace("\n", "\n  ")
