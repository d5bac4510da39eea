"""The commands inspect, pack, index and verify: from the user's files to checked shards."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import FAILED, OK, add_command, count, encoding, part, share
from pipeline.config import ConfigError
from pipeline.config.templates import TEMPLATES

if TYPE_CHECKING:
    from pipeline.data.eval.wds_layout import PackEvalReport
    from pipeline.data.shards.index import PackReport, ShardIndex
    from pipeline.data.sources.account import Account
    from pipeline.data.sources.sample import Source, SourceOptions


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    _add_inspect(commands)
    _add_pack(commands)
    _add_index(commands)
    _add_verify(commands)


def _add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        run_inspect,
        "show what a folder or table of images holds before packing it: format, counts, classes, captions, faults; or "
        "which blocks of a run are active",
        "selora inspect photos/",
        "selora inspect photos/ --with runs/my_run --sheet review.html",
        "selora inspect runs/my_run",
        text_only=True,
    )
    _add_source(parser)
    _add_report(parser)
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="write an HTML page with a few images of each class, or with captions, as the model sees them; of packed "
        "shards as well; with --with, of the model's findings",
    )
    parser.add_argument(
        "--with",
        dest="model",
        metavar="MODEL",
        help="also look with this model (a run, an export, models:/NAME@ALIAS or a name as in model.name) for "
        "near-duplicates, labels that the nearest images contradict, and classes that overlap",
    )
    parser.add_argument(
        "--pretrained", metavar="TAG", help="with --with: open_clip tag or weights file of a plain model"
    )
    parser.add_argument(
        "--uri", help="with --with: store of models:/ (default: MLFLOW_TRACKING_URI, or runs/mlflow.db)"
    )
    parser.add_argument(
        "--duplicate",
        type=share,
        metavar="COSINE",
        help="with --with: similarity from which two images are near-duplicates (default: 0.985)",
    )


def run_inspect(arguments: argparse.Namespace) -> int:
    from pipeline.runs.run import is_run

    if is_run(arguments.source):
        from pipeline.runs.blocks import describe_blocks

        print(describe_blocks(arguments.source))
        return OK
    packed = (arguments.source / "index.json").is_file()
    if packed and (arguments.sheet is not None or arguments.model is not None):
        from pipeline.data.shards.foreign import read_shards

        source = read_shards(arguments.source)
        return _look(arguments, source, source.account())
    from pipeline.data.sources.inspection import inspect

    found = inspect(arguments.source, _source_options(arguments))
    print(found)
    if arguments.report is not None and arguments.model is None:
        _write_report(arguments.report, found.source, found.account)
    return _look(arguments, found.source, found.account)


def _look(arguments: argparse.Namespace, source: Source, account: Account) -> int:
    """Write the sheet of a source, or of a model's findings in it."""
    if arguments.model is not None:
        return _look_over(arguments, source, account)
    if arguments.sheet is not None:
        from pipeline.data.sheet import write_sheet

        print(f"{arguments.sheet}: {write_sheet(source, arguments.sheet)} images")
    return OK


def _look_over(arguments: argparse.Namespace, source: Source, account: Account) -> int:
    from pipeline.vectors.embedder import load_embedder
    from pipeline.vectors.look import look_over
    from pipeline.vectors.review import DUPLICATE

    embedder = load_embedder(arguments.model, pretrained=arguments.pretrained, uri=arguments.uri)
    found = look_over(
        source,
        embedder,
        DUPLICATE if arguments.duplicate is None else arguments.duplicate,
        say=lambda line: print(f"inspect: {line}", file=sys.stderr, flush=True),
    )
    print(found)
    if arguments.sheet is not None:
        found.write_page(arguments.sheet, f"{source.path.name}, reviewed with {arguments.model}")
        print(arguments.sheet)
    if arguments.report is not None:
        _write_report(arguments.report, source, account, found.as_json())
    return OK


def _add_pack(commands: Any) -> None:
    parser = add_command(
        commands,
        "pack",
        run_pack,
        "write images as WebDataset shards with an index.json",
        "selora pack photos/ shards/train",
        "selora pack photos_test/ eval_sets/wds_photos --eval",
        "selora pack --dataset objectnet originals/objectnet-1.0 eval_sets/wds_objectnet",
        "selora pack --dataset imagenet-train originals/ILSVRC shards/imagenet --workers 32",
        "selora pack --dataset cifar100 --split train originals/cifar shards/cifar100",
    )
    _add_source(parser)
    parser.add_argument("out", type=Path, help="new or empty directory for the shards")
    parser.add_argument("--samples-per-shard", type=count, metavar="N", help="default: 16 shards of 64 to 5000 samples")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the order in the shards (default: 0)")
    _add_checks(parser)
    parser.add_argument("--force", action="store_true", help="replace existing shards")
    parser.add_argument(
        "--eval", action="store_true", help="write an evaluation set for a benchmark instead of training shards"
    )
    parser.add_argument(
        "--templates",
        default="openai",
        choices=sorted(TEMPLATES),
        help="with --eval: set of caption templates (default: openai, the 80 sentences of CLIP's authors, with which "
        "configs/own_data.yaml trains)",
    )
    parser.add_argument(
        "--dataset",
        action=_Dataset,
        metavar="NAME",
        help="the source is this public dataset, as distributed by its authors; writes an evaluation set, and for "
        "imagenet-train training shards; list: print all names",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="with --dataset: train writes its training images as training shards, val its validation images as an "
        "evaluation set",
    )
    parser.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="with imagenet-train: only part I of N, for N parallel jobs; the last to finish writes the index",
    )


def _add_checks(parser: argparse.ArgumentParser) -> None:
    """Options that select images."""
    parser.add_argument(
        "--check", choices=("decode", "none"), default="decode", help="decode every image once (default), or none"
    )
    parser.add_argument(
        "--max-unreadable",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="fail when a larger share of the images is unreadable or missing (default: 0.01)",
    )
    parser.add_argument("--workers", type=count, default=4, metavar="N", help="decoding threads (default: 4)")
    _add_report(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write the summary as JSON, with the name of each image that was left out",
    )


class _Dataset(argparse.Action):
    """`--dataset list` prints the names and exits; like --help, it needs no other argument."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if values == "list":
            from pipeline.data.originals.convert import known_datasets

            print("\n".join(known_datasets()))
            parser.exit()
        setattr(namespace, self.dest, values)


def run_pack(arguments: argparse.Namespace) -> int:
    if arguments.dataset is not None:
        from pipeline.cli.originals import pack_dataset

        return pack_dataset(arguments)
    if arguments.part is not None:
        raise ConfigError("--part needs --dataset imagenet-train")
    if arguments.split is not None:
        raise ConfigError("--split needs --dataset")
    if arguments.eval:
        return _pack_eval(arguments)
    from pipeline.data.shards.index import pack

    report = pack(
        arguments.source,
        arguments.out,
        options=_source_options(arguments),
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        check=arguments.check,
        max_unreadable=arguments.max_unreadable,
        force=arguments.force,
        workers=arguments.workers,
    )
    return _end_of_pack(arguments, report, report.index)


def _end_of_pack(arguments: argparse.Namespace, report: PackReport | PackEvalReport, index: ShardIndex | None) -> int:
    """Print the files written, notes on the source, and totals."""
    from pipeline.data.sources.classes import shown_mapping

    if index is not None:
        classes = f", {len(index.classes)} classes" if index.classes else ""
        print(f"{index.directory}: {index.samples} samples{classes} in {len(index.shards)} shards")
    source = report.source
    if source.classes is not None and source.folders and list(source.folders) != source.classes:
        print("\n".join(f"  {line}" for line in shown_mapping(source.folders, source.classes)))
    for note in source.notes:
        print(f"note: {note}")
    print(report.account)
    if arguments.report is not None:
        _write_report(arguments.report, report.source, report.account)
    return OK


def _write_report(file: Path, source: Source, account: Account, review: dict[str, Any] | None = None) -> None:
    content = {"source": str(source.path), "format": source.format, **account.as_json(), "notes": list(source.notes)}
    if review is not None:
        content["review"] = review
    if source.classes is not None:
        content["classes"] = [
            {"folder": folder, "name": name}
            for folder, name in zip(source.folders or source.classes, source.classes, strict=True)
        ]
    try:
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--report {file}: {error.strerror}; give a file in a folder that exists") from error


def _pack_eval(arguments: argparse.Namespace) -> int:
    from pipeline.data.eval.wds_layout import pack_eval

    report = pack_eval(
        arguments.source,
        arguments.out,
        options=_source_options(arguments),
        templates=arguments.templates,
        max_unreadable=arguments.max_unreadable,
        force=arguments.force,
        workers=arguments.workers,
    )
    print(f"{arguments.out}: an evaluation set of {len(report.eval_set)} images")
    return _end_of_pack(arguments, report, None)


def _add_index(commands: Any) -> None:
    parser = add_command(
        commands,
        "index",
        run_index,
        "check WebDataset tars that others wrote and put an index.json next to them, to train on them as they are",
        "selora index laion/",
        "selora index 'imagenet/train-{0000..0146}.tar' --classnames names.txt",
    )
    parser.add_argument("source", help="folder of tars, or a pattern as in 'shards/{00000..00010}.tar'")
    parser.add_argument("--classnames", type=Path, metavar="FILE", help="names of the classes in cls, one per line")
    parser.add_argument("--force", action="store_true", help="replace the index.json that is there")
    _add_checks(parser)


def run_index(arguments: argparse.Namespace) -> int:
    from pipeline.data.shards.foreign import index_tars
    from pipeline.data.sources.sample import SourceOptions

    report = index_tars(
        arguments.source,
        options=SourceOptions(classnames=arguments.classnames),
        force=arguments.force,
        decoded=arguments.check == "decode",
        max_unreadable=arguments.max_unreadable,
        workers=arguments.workers,
    )
    return _end_of_pack(arguments, report, report.index)


def _add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        run_verify,
        "check shards against their index: counts, sizes and checksums; decode every image",
        "selora verify shards/train",
        text_only=True,
    )
    parser.add_argument("shards", help="directory with index.json")
    parser.add_argument("--no-decode", action="store_true", help="check only the checksums, without decoding")


def run_verify(arguments: argparse.Namespace) -> int:
    from pipeline.data.shards.verify import verify

    report = verify(arguments.shards, decode=not arguments.no_decode)
    print(report)
    return OK if report.ok else FAILED


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        help="folder of class folders or of images with captions, table (csv, tsv, txt), json, jsonl, or tars",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "imagefolder", "sidecar", "csv", "json", "coco", "webdataset"),
        default="auto",
        help="layout of the source (default: detected)",
    )
    parser.add_argument(
        "--classnames", type=Path, metavar="FILE", help="readable class names: 'folder<TAB>name' lines, or json"
    )
    parser.add_argument("--image-column", metavar="NAME", help="csv, json: column with image paths")
    parser.add_argument("--caption-column", metavar="NAME", help="csv, json: column with captions")
    parser.add_argument("--class-column", metavar="NAME", help="csv, json: column with class names")
    parser.add_argument(
        "--image-root",
        type=Path,
        metavar="DIR",
        help="csv, json: folder of relative image paths (default: found by looking next to the file, in its image "
        "folders, in the working directory and above the file)",
    )
    parser.add_argument(
        "--encoding",
        type=encoding,
        metavar="NAME",
        help="encoding of text files that are not UTF-8, as in cp1252, utf-16-le, shift_jis",
    )
    parser.add_argument(
        "--quotes",
        choices=("auto", "csv", "none"),
        default="auto",
        help="csv: whether quotes enclose fields or are letters (default: detected)",
    )


def _source_options(arguments: argparse.Namespace) -> SourceOptions:
    from pipeline.data.sources.sample import SourceOptions

    return SourceOptions(**{each.name: getattr(arguments, each.name) for each in fields(SourceOptions)})
