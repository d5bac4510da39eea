"""`selora pack --dataset`: public datasets as distributed by their authors, with the benchmark's counts and names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, replace

from pipeline.cli.options import OK
from pipeline.config import ConfigError
from pipeline.data.originals.convert import BANK, TEST, convert, original, read_original
from pipeline.data.originals.imagenet import wnids
from pipeline.data.originals.train import list_imagenet_train
from pipeline.data.shards.index import ShardIndex, check_empty, pack
from pipeline.data.shards.parallel_pack import Packing, pack_in_parallel
from pipeline.data.sources.sample import SourceOptions
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.rows import Row

TRAIN = "imagenet-train"
SAMPLES_PER_SHARD = 5000
# Options of `selora pack` for the user's own images, and options for training shards only.
_FOR_OWN_IMAGES = (
    *(each.name for each in fields(SourceOptions)),
    "eval",
    "templates",
    "max_unreadable",
    "report",
)
_FOR_TRAINING = ("samples_per_shard", "seed", "part")


def pack_dataset(arguments: argparse.Namespace) -> int:
    """Convert one dataset. Options that have no effect on it are refused."""
    whole, training = arguments.dataset == TRAIN, arguments.split == "train"
    useless = _FOR_OWN_IMAGES + (("split",) if whole else ("part",) if training else _FOR_TRAINING)
    given = [name for name in useless if getattr(arguments, name) != arguments.parser.get_default(name)]
    if given:
        listed = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--dataset {arguments.dataset}: cannot be combined with {listed}")
    # Only counts and names are read from the rows, so the root does not matter.
    rows = {row.key: row for name in ("vision", "paper") for row in load_benchmark(name, root=".").rows}
    work = _pack_train if whole else _pack_shards if training else _pack_evaluation
    return work(arguments, rows)


def _pack_evaluation(arguments: argparse.Namespace, rows: Mapping[str, Row]) -> int:
    split = arguments.split or TEST
    known, row = original(arguments.dataset, split), rows[arguments.dataset]
    if split == TEST:
        known = known.counted(images=row.images, classes=row.classes, captions=row.texts)
    made = convert(
        known,
        arguments.source,
        arguments.out,
        wnid_names=_wnid_names(rows),
        templates=row.templates or "openai",
        split=split,
        decoded=arguments.check == "decode",
        force=arguments.force,
        workers=arguments.workers,
    )
    which = "" if split == TEST else f" ({split})"
    besides = "" if known.bank is None else f", and a bank of {known.bank.images} in {BANK}/"
    print(f"{arguments.out}: {row.key}{which}, {len(made)} images in {len(made.tars)} shards, all of them{besides}")
    return _licence(row)


def _pack_shards(arguments: argparse.Namespace, rows: Mapping[str, Row]) -> int:
    """Pack the training images as training shards, with the class names of the evaluation."""
    known, row = original(arguments.dataset, arguments.split), rows[arguments.dataset]
    check_empty(arguments.out, arguments.force)
    source = read_original(known, arguments.source)
    if row.classnames is not None:
        source = replace(source, classes=list(row.classnames))
    index = pack(
        source,
        arguments.out,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        force=arguments.force,
        check=arguments.check,
        max_unreadable=0,
        workers=arguments.workers,
    ).index
    _print_index(index)
    return _licence(row)


def _licence(row: Row) -> int:
    print(f"licence: {row.licence or 'not known'}" + (f"; {row.restriction}" if row.restriction else ""))
    return OK


def _pack_train(arguments: argparse.Namespace, rows: Mapping[str, Row]) -> int:
    names = _wnid_names(rows)
    packing = Packing(
        list_imagenet_train(arguments.source),
        arguments.out,
        [names[wnid] for wnid in wnids()],
        seed=arguments.seed,
        samples_per_shard=arguments.samples_per_shard or SAMPLES_PER_SHARD,
        decoded=arguments.check == "decode",
    )
    part = arguments.part or (1, 1)
    index = pack_in_parallel(
        packing, workers=arguments.workers, part=part, force=arguments.force, on_progress=_print_progress
    )
    if index is None:
        print(f"{arguments.out}: part {part[0]} of {part[1]} is packed; the last one writes the index")
        return OK
    _print_index(index)
    return OK


def _print_index(index: ShardIndex) -> None:
    classes = f", {len(index.classes)} classes" if index.classes else ""
    print(f"{index.directory}: {index.samples} samples{classes} in {len(index.shards)} shards")


def _print_progress(done: int, total: int) -> None:
    print(f"{done} of {total} shards", file=sys.stderr, flush=True)


def _wnid_names(rows: Mapping[str, Row]) -> dict[str, str]:
    """{wnid: readable name} of ImageNet, from any row that is scored among its 1000 classes."""
    known = wnids()
    names = next(
        row.classnames for row in rows.values() if row.classnames is not None and len(row.classnames) == len(known)
    )
    return dict(zip(known, names, strict=True))
