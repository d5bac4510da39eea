"""`selora pack --dataset`: public datasets as their authors hand them out, with counts and names from the benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.cli.options import OK
from pipeline.config import ConfigError
from pipeline.data.originals.convert import convert, original
from pipeline.data.originals.imagenet import wnids
from pipeline.data.originals.train import list_imagenet_train
from pipeline.data.parallel_pack import Packing, pack_in_parallel
from pipeline.evaluation.benchmark import load_benchmark
from pipeline.evaluation.rows import Row

TRAIN = "imagenet-train"
SAMPLES_PER_SHARD = 5000
# Options of `selora pack` that are for the user's own images, and those that only training shards have.
_FOR_OWN_IMAGES = (
    "format",
    "classnames",
    "image_column",
    "caption_column",
    "class_column",
    "eval",
    "templates",
    "max_unreadable",
)
_FOR_TRAINING = ("samples_per_shard", "seed", "part")


def pack_dataset(arguments: argparse.Namespace) -> int:
    """Convert one dataset. Options that would mean nothing are refused."""
    training = arguments.dataset == TRAIN
    useless = _FOR_OWN_IMAGES if training else (*_FOR_OWN_IMAGES, *_FOR_TRAINING)
    given = [name for name in useless if getattr(arguments, name) != arguments.default_of(name)]
    if given:
        listed = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--dataset {arguments.dataset}: does not go with {listed}")
    # Counts and names are asked of the rows; where their directories lie does not matter.
    rows = load_benchmark("paper", root=".").rows
    return _pack_train(arguments, rows) if training else _pack_evaluation(arguments, rows)


def _pack_evaluation(arguments: argparse.Namespace, rows: Sequence[Row]) -> int:
    known = original(arguments.dataset)
    row = next(row for row in rows if row.key == arguments.dataset)
    made = convert(
        known.counted(images=row.images, classes=row.classes, captions=row.texts),
        arguments.source,
        arguments.out,
        wnid_names=_wnid_names(rows),
        templates=row.templates or (),
        decoded=arguments.check == "decode",
        force=arguments.force,
        workers=arguments.workers,
    )
    print(f"{arguments.out}: {row.key}, {len(made)} images in {len(made.tars)} shards, all of them")
    print(f"licence: {row.licence or 'not known'}" + (f"; {row.restriction}" if row.restriction else ""))
    return OK


def _pack_train(arguments: argparse.Namespace, rows: Sequence[Row]) -> int:
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
    index = pack_in_parallel(packing, workers=arguments.workers, part=part, force=arguments.force, told=_tell)
    if index is None:
        print(f"{arguments.out}: part {part[0]} of {part[1]} is packed; the last one writes the index")
        return OK
    classes = f", {len(index.classes)} classes" if index.classes else ""
    print(f"{index.directory}: {index.samples} samples{classes} in {len(index.shards)} shards")
    return OK


def _tell(done: int, total: int) -> None:
    print(f"{done} of {total} shards", file=sys.stderr, flush=True)


def _wnid_names(rows: Sequence[Row]) -> dict[str, str]:
    """ImageNet's readable names, which every row has that is scored among its 1000 classes."""
    known = wnids()
    names = next(row.classnames for row in rows if row.classnames is not None and len(row.classnames) == len(known))
    return dict(zip(known, names, strict=True))
