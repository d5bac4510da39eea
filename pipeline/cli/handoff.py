"""The commands export, promote and predict: a run for other libraries, for the registry, and predictions from it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import FAILED, OK, add_command, count, share, strength
from pipeline.config import ConfigError

if TYPE_CHECKING:
    from pipeline.handoff.graphs import GraphOptions
    from pipeline.handoff.source import TrainedModel


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    _add_export(commands)
    _add_promote(commands)
    _add_predict(commands)


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        run_export,
        "write a run's model for open_clip, transformers, peft, timm, ONNX or Triton, and check its outputs there",
        "selora export runs/my_run out/clip --to open_clip",
        "selora export runs/my_run out/adapter --to peft",
        "selora export runs/my_run out/onnx --to onnx --fp16",
    )
    parser.add_argument("target", metavar="RUN_OR_SWEEP", help="directory of a run or of a sweep")
    parser.add_argument("out", type=Path, metavar="OUT", help="new directory")
    parser.add_argument(
        "--to",
        required=True,
        choices=("open_clip", "hf", "peft", "timm", "onnx", "triton"),
        help="library or server to write for (a ViT: timm, onnx, triton)",
    )
    _add_blocks(parser)
    _add_graph(parser)
    parser.add_argument(
        "--unverified", action="store_true", help="do not load the export with the library to compare outputs"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export in OUT")
    hub = parser.add_argument_group("Hugging Face hub")
    hub.add_argument(
        "--push", metavar="ORG/NAME", help="also upload the export to this repository, private if it is new"
    )
    hub.add_argument("--public", action="store_true", help="with --push: make a new repository public")
    hub.add_argument("--dry-run", action="store_true", help="with --push: upload nothing, list the files")


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    """Options that select the exported weights."""
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--merged",
        action="store_true",
        default=None,
        help="merge the blocks into the weights (default, except for peft)",
    )
    kept.add_argument(
        "--keep-adapters",
        dest="merged",
        action="store_false",
        help="keep the blocks separate from the weights (default for peft)",
    )
    parser.add_argument(
        "--step", type=count, metavar="N", help="step of the checkpoint to export (default: the newest)"
    )
    parser.add_argument(
        "--strength",
        type=strength,
        metavar="A",
        help="strength of the fine-tuning, above 0, up to 1 (default), or auto: the largest that keeps the floor",
    )
    parser.add_argument(
        "--floor",
        type=share,
        metavar="SHARE",
        help="share kept that --strength auto looks for (default: promote.min_kept, promote.max_forgetting)",
    )
    parser.add_argument("--base", metavar="PATH", help="new place of the run's base, if it has moved")
    parser.add_argument(
        "--base-name", metavar="NAME", help="name of the base model in the PEFT adapter (default: its path)"
    )


def _add_graph(parser: argparse.ArgumentParser) -> None:
    """Options of ONNX and Triton exports."""
    options = parser.add_argument_group("ONNX and Triton")
    precision = options.add_mutually_exclusive_group()
    for name, what in (
        ("fp16", "weights and activations in half precision (default: fp32)"),
        ("int8", "weights of the matrix products in 8 bits; the loss is measured on a benchmark"),
    ):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=what)
    options.add_argument(
        "--pixels",
        choices=("uint8", "normalized"),
        help="input of the image graph: bytes, which it normalizes (default), or floats that the caller has normalized",
    )
    options.add_argument(
        "--classnames",
        type=Path,
        metavar="FILE",
        help="class names of the zero-shot head, one per line (default: those of the training)",
    )
    options.add_argument("--templates", metavar="NAME", help="caption templates of the head (default: data.templates)")
    options.add_argument(
        "--benchmark",
        metavar="NAME",
        help="with --int8: benchmark that measures the loss, a name or a file (default: the run's own)",
    )
    options.add_argument("--limit", type=count, metavar="N", help="with --int8: use only N images of each dataset")


def run_export(arguments: argparse.Namespace) -> int:
    from pipeline.handoff.choice import chosen_run, strength_at_floor
    from pipeline.handoff.export import export
    from pipeline.handoff.hub import check_push, push
    from pipeline.handoff.source import Mismatch
    from pipeline.model.restore import move_base

    if arguments.push is not None:
        check_push(arguments.push, arguments.dry_run)
    elif arguments.public or arguments.dry_run:
        raise ConfigError("--public and --dry-run need --push ORG/NAME")

    run_dir, chosen = chosen_run(Path(arguments.target))
    if chosen:
        print(chosen, file=sys.stderr)
    if arguments.base is not None:
        move_base(run_dir, arguments.base)
    alpha = strength_at_floor(Path(arguments.target), run_dir) or 1.0 if arguments.strength is None else 1.0
    if arguments.strength is not None:
        alpha, notes = _strength_of_export(arguments, run_dir)
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    try:
        report = export(
            run_dir,
            arguments.to,
            arguments.out,
            merged=arguments.merged,
            step=arguments.step,
            verify=not arguments.unverified,
            base_name=arguments.base_name,
            force=arguments.force,
            strength=alpha,
            graph=_graph_options(arguments, run_dir),
        )
    except Mismatch as error:
        print(f"selora export: {error}", file=sys.stderr)
        return FAILED
    print(report)
    if arguments.push is not None:
        print(push(report.directory, arguments.push, private=not arguments.public, dry_run=arguments.dry_run))
    return OK


GRAPH_OPTIONS = ("precision", "pixels", "classnames", "templates", "benchmark", "limit")


def _graph_options(arguments: argparse.Namespace, run_dir: Path) -> Callable[[TrainedModel], GraphOptions] | None:
    """A function from the model to the options of an ONNX or Triton export; ConfigError for other formats."""
    given = {name: value for name in GRAPH_OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.to not in ("onnx", "triton"):
        if given:
            option = f"--{given['precision']}" if "precision" in given else f"--{next(iter(given))}"
            raise ConfigError(f"{option} needs --to onnx or --to triton")
        return None
    if "classnames" in given:
        given["classnames"] = _lines(given["classnames"])
    from pipeline.handoff.graph_options import graph_options

    return lambda source: graph_options(source, run_dir, **given)


def _strength_of_export(arguments: argparse.Namespace, run_dir: Path) -> tuple[float, list[str]]:
    from pipeline.config import Promote, load_config
    from pipeline.handoff.strength import strength_of_export

    if arguments.step is not None and arguments.strength == "auto":
        raise ConfigError("--strength auto uses the newest checkpoint: leave out --step")
    config = load_config(run_dir / "config.yaml")
    rule = config.promote if arguments.floor is None else Promote(min_kept=arguments.floor)
    return strength_of_export(run_dir, arguments.strength, rule, config)


def _add_promote(commands: Any) -> None:
    parser = add_command(
        commands,
        "promote",
        run_promote,
        "register a run, or the best trial of a sweep, as a model version in MLflow, if the promotion rule holds",
        "selora promote runs/my_run --name my-clip --rule min_id=0.75 max_forgetting=0.02",
        "selora promote runs/my_sweep --name my-clip --champion",
        "selora promote runs/my_run --name my-clip --strength auto --rule min_kept=0.95",
        "selora promote --name my-clip --rollback",
    )
    parser.add_argument("target", nargs="?", metavar="RUN_OR_SWEEP", help="directory of a run or of a sweep")
    parser.add_argument("--name", required=True, help="name of the registered model")
    parser.add_argument(
        "--rule",
        nargs="+",
        metavar="key=value",
        help="options of the section promote that replace those of the run's config",
    )
    parser.add_argument(
        "--strength",
        type=strength,
        metavar="A",
        help="register the model at this strength, above 0, up to 1 (default), or auto: at the largest strength that "
        "keeps the floor of the rule, min_kept or max_forgetting",
    )
    parser.add_argument("--base", metavar="PATH", help="new place of the run's base, if it has moved")
    parser.add_argument("--champion", action="store_true", help="also give it the alias champion")
    parser.add_argument("--rollback", action="store_true", help="give the alias champion back to the previous champion")
    parser.add_argument("--uri", help="MLflow tracking server or database (default: the run's own)")
    parser.add_argument(
        "--classnames", type=Path, metavar="FILE", help="class names, one per line (default: those of the training)"
    )
    parser.add_argument("--templates", metavar="NAME", help="caption templates by name (default: data.templates)")


def run_promote(arguments: argparse.Namespace) -> int:
    from pipeline.handoff.choice import chosen_run, rule_of
    from pipeline.handoff.promote import promote, rollback
    from pipeline.model.restore import move_base

    if arguments.rollback:
        if arguments.target is not None or arguments.champion:
            raise ConfigError("--rollback takes a name and no run: the previous champion is in the registry")
        old, new = rollback(arguments.name, arguments.uri)
        print(f"{arguments.name}: champion is version {new} again, was version {old}")
        return OK
    if arguments.target is None:
        raise ConfigError("RUN_OR_SWEEP: name the directory of a run or of a sweep")
    rule = rule_of(Path(arguments.target), arguments.rule or [])
    if arguments.base is not None:
        move_base(chosen_run(Path(arguments.target), rule)[0], arguments.base)
    done = promote(
        arguments.target,
        arguments.name,
        rule,
        champion=arguments.champion,
        uri=arguments.uri,
        class_names=None if arguments.classnames is None else _lines(arguments.classnames),
        templates=arguments.templates,
        strength=arguments.strength,
    )
    print(done)
    return OK if done.version is not None else FAILED


def _add_predict(commands: Any) -> None:
    parser = add_command(
        commands,
        "predict",
        run_predict,
        "classify images with a registered model",
        "selora predict models:/my-clip@champion photo.jpg",
        "selora predict models:/my-clip/3 photos/*.jpg --classes 'a cat' 'a dog' --json",
        text_only=True,
    )
    parser.add_argument("model", metavar="MODEL_URI", help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--uri", help="MLflow server or database (default: MLFLOW_TRACKING_URI, or runs/mlflow.db)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="use these class names instead of the model's own")
    parser.add_argument("--top", type=count, default=3, metavar="N", help="number of labels per image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def run_predict(arguments: argparse.Namespace) -> int:
    if folders := [path for path in arguments.images if path.is_dir()]:
        raise ConfigError(f"{folders[0]} is a folder: name the images in it, as in {folders[0]}/*.jpg")
    from pipeline.handoff.predict import predict_files

    rows = predict_files(
        arguments.model, arguments.images, uri=arguments.uri, class_names=arguments.classes, top_k=arguments.top
    )
    for path, row in zip(arguments.images, rows, strict=True):
        if "error" in row:
            print(f"selora predict: {path}: {row['error']}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"image": str(path), **row}, ensure_ascii=False))
        elif "error" not in row:
            best = ", ".join(f"{name} {score:.3f}" for name, score in zip(row["labels"], row["scores"], strict=True))
            print(f"{path}: {best}")
    sys.stdout.flush()
    return FAILED if any("error" in row for row in rows) else OK


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ConfigError(f"--classnames: no file {file}")
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
