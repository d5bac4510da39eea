"""A public dataset as distributed by its authors -> an evaluation set in clip-benchmark's layout, exact in number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.eval.wds_layout import EvalSet, write_wds_eval
from pipeline.data.images import MAX_PIXELS
from pipeline.data.originals.table import ORIGINALS, Original
from pipeline.data.shards.index import check_empty
from pipeline.data.sources.readable import usable_samples
from pipeline.data.sources.sample import Source
from pipeline.prompts import resolve_templates

_NAMED = 5


TEST, BANK = "test", "train"


def original(name: str, split: str = TEST) -> Original:
    """The row of a dataset, or of one of its other splits. Raises ConfigError for an unknown name."""
    if name not in ORIGINALS:
        raise ConfigError(f"--dataset: {name!r} is not known; there are {', '.join(known_datasets())}")
    row = ORIGINALS[name]
    if split == TEST:
        return row
    if split not in row.splits:
        raise ConfigError(f"--split: {split!r} of {name} is not packed, only {', '.join((TEST, *row.splits))}")
    return row.of(row.splits[split])


def read_original(row: Original, root: str | Path) -> Source:
    """The images of a dataset in the user's folder. Raises ConfigError for wrong counts, with their likely cause."""
    folder = Path(root)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; it must hold {row.holds}")
    try:
        source = row.read(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}\nit must hold {row.holds}") from error
    check_counts(row, source)
    return source


def known_datasets() -> list[str]:
    """The names for `selora pack --dataset`: the benchmark's datasets, and the training images."""
    return [*ORIGINALS, "imagenet-train"]


def convert(
    row: Original,
    root: str | Path,
    out: str | Path,
    *,
    wnid_names: Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "openai",
    split: str = TEST,
    decoded: bool = True,
    force: bool = False,
    workers: int = 4,
    max_pixels: int = MAX_PIXELS,
) -> EvalSet:
    """Write the dataset in the user's folder ``root`` as an evaluation set.

    Files keep their bytes, and arrays become lossless webp. A bank becomes the split "train" of the set.
    ``wnid_names``: readable names for datasets that name their classes by wnid. ``decoded``: decode every image once.
    Raises ConfigError, before anything is written, for wrong counts with their likely cause, and for unreadable images.
    """
    check_empty(Path(out), force)
    parts = {split: row} | ({} if row.bank is None else {BANK: row.of(row.bank)})
    found = {name: read_original(part, root) for name, part in parts.items()}
    usable = {
        name: usable_samples(source, decoded=decoded, max_unreadable=0, max_pixels=max_pixels, workers=workers)[0]
        for name, source in found.items()
    }
    if row.is_retrieval:
        return write_wds_eval(usable[split], out, kind="retrieval", split=split, as_found=True, force=force)
    names = [(wnid_names or {}).get(name, name) for name in found[split].classes or ()]
    sentences = resolve_templates(templates)
    written = [
        # Both were found to have an empty folder, or one that may be overwritten.
        write_wds_eval(good, out, classnames=names, templates=sentences, split=name, as_found=True, force=True)
        for name, good in usable.items()
    ]
    return written[0]


def check_counts(row: Original, source: Source) -> None:
    """Raise one ConfigError with all found and expected counts and their likely cause."""
    found = len(source.samples)
    faults = [f"images: {found} found, {row.images} expected"] if found != row.images else []
    if source.left_out:
        faults.append(
            f"files: {len(source.left_out)} are listed but missing: {_few([each.name for each in source.left_out])}"
        )
    faults += _class_faults(row, source) if row.classes is not None else []
    captions = sum(len(sample.captions) for sample in source.samples)
    if row.captions is not None and captions != row.captions:
        faults.append(f"captions: {captions} found, {row.captions} expected")
    if faults:
        cause = row.known.get(found) or (row.fewer if found < row.images or source.left_out else row.more)
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(f"{source.path}: not the whole dataset{listed}\nlikely: {cause}\nit must hold {row.holds}")


def _class_faults(row: Original, source: Source) -> list[str]:
    classes = source.classes or []
    counts = Counter(sample.cls for sample in source.samples)
    faults = []
    if len(counts) != row.classes or len(classes) != row.classes:
        empty = [name for label, name in enumerate(classes) if not counts[label]]
        without = f", none of {_few(empty)}" if empty else ""
        faults.append(f"classes: {len(counts)} found, {row.classes} expected{without}")
    if row.per_class is not None:
        odd = [
            f"{name} {counts[label]}" for label, name in enumerate(classes) if counts[label] not in (0, row.per_class)
        ]
        faults += [f"images of a class: {row.per_class} expected, but {_few(odd)}"] if odd else []
    return faults


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
