"""Which data of a benchmark is present, and whether it reproduces the published numbers of the untouched CLIP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import VIT_SCHEMA, ConfigError
from pipeline.data.classnames import plain_name
from pipeline.data.originals.table import ORIGINALS
from pipeline.evaluation.datasets.benchmark import Benchmark, is_there
from pipeline.evaluation.datasets.dataset import Dataset, open_dataset
from pipeline.evaluation.datasets.rows import TOLERANCE, Row
from pipeline.evaluation.results import Result


@dataclass(frozen=True)
class Inspected:
    """A row and the content of its directory. `fault`: why it cannot be evaluated, and the way out."""

    row: Row
    images: int | None = None
    classes: int | None = None
    texts: int | None = None
    digest: str | None = None
    bank: int | None = None
    fault: str | None = None
    remark: str | None = None


def inspect_benchmark(benchmark: Benchmark) -> Iterable[Inspected]:
    """Open the rows one after the other; no image is decoded."""
    return (inspect_row(row) for row in benchmark.rows)


def inspect_row(row: Row) -> Inspected:
    """`digest` covers the images, labels and captions: equal ones on two machines are equal data.

    For K-NN it covers the query images and the bank.
    """
    if not is_there(row):
        split = "" if row.split == "test" else f" --split {row.split}"
        made = f"`selora pack --dataset {row.key}{split}` makes it"
        return Inspected(row, fault=f"not found; put it to {row.path}, or {made}")
    try:
        dataset = open_dataset(row)
    except ConfigError as error:
        return Inspected(row, fault=str(error).replace("\n", "; "))
    texts = sum(len(captions) for captions in dataset.data.captions) or None
    classes = None if row.is_retrieval else dataset.classes
    digest, bank = dataset.data.digest, dataset.bank
    if bank is not None:
        return Inspected(row, len(dataset.data), classes, texts, f"{digest}+{bank.digest}", len(bank))
    return Inspected(row, len(dataset.data), classes, texts, digest, remark=_names_remark(dataset))


def expected(row: Row) -> Inspected:
    """What a row's directory should hold, and how it is made, without a look at any directory."""
    known = ORIGINALS.get(row.key)
    if known is None:
        made = f"put a clip-benchmark folder to ROOT/{Path(row.path).name}"
    else:
        split = "" if row.split == "test" else f" --split {row.split}"
        made = f"`selora pack --dataset {row.key}{split} DIR ROOT/{Path(row.path).name}`, where DIR holds {known.holds}"
    return Inspected(row, row.images, row.classes, row.texts, fault=made)


def _names_remark(dataset: Dataset) -> str | None:
    """Where the row's class names and the directory's differ by more than spelling: labels may mean other classes."""
    shipped, subset = dataset.data.classnames or (), dataset.row.subset
    if dataset.row.classnames is None or (subset is not None and any(len(ids) > 1 for ids in subset)):
        return None
    ours = dataset.classnames if subset is None else [dataset.classnames[ids[0]] for ids in subset]
    other = [(a, b) for a, b in zip(shipped, ours, strict=False) if plain_name(a) not in plain_name(b)]
    if not other:
        return None
    first = f"{other[0][0]!r} where the row has {other[0][1]!r}"
    warning = "; are the labels in another order?" if 2 * len(other) > len(ours) else ""
    return f"{len(other)} of {len(ours)} names in classnames.txt differ, first {first}{warning}"


def format_inspection(found: Sequence[Inspected], *, looked: bool = True) -> str:
    """A line per dataset, and below it what to do. ``looked``: whether the directories were looked at."""
    lines = [("", "dataset", "images", "classes", "digest", "licence")]
    notes: dict[int, str] = {}
    for each in found:
        counted = each.classes if each.texts is None else f"{each.texts} texts"
        licence = "; ".join(text for text in (each.row.licence, each.row.restriction) if text)
        lines.append((
            "ok" if each.fault is None else "--" if looked else "",
            each.row.key,
            _or_blank(each.images) + ("" if each.bank is None else f"+{each.bank}"),
            _or_blank(counted),
            _or_blank(each.digest),
            licence,
        ))  # fmt: skip
        if each.fault or each.remark:
            notes[len(lines) - 1] = each.fault or f"remark: {each.remark}"
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = []
    for number, line in enumerate(lines):
        shown.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number in notes:
            shown.append(f"      {notes[number]}")
    if not looked:
        shown.append(f"{len(found)} datasets; with --root ROOT each is looked at")
        return "\n".join(shown)
    missing = [each.row.key for each in found if each.fault]
    shown.append(f"{len(found) - len(missing)} of {len(found)} datasets are ready")
    return "\n".join(shown)


def _or_blank(value: object) -> str:
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Compared:
    """A published number, in percent, and ours. `allowed`: its tolerance plus the uncertainty of a drawn sample."""

    key: str
    metric: str
    published: float
    value: float
    allowed: float

    @property
    def agrees(self) -> bool:
        # The published numbers are rounded, so a value on the very edge of the tolerance may be on either side.
        return abs(self.value - self.published) <= self.allowed + 1e-6


def compare_with_published(benchmark: Benchmark, results: Mapping[str, Result]) -> list[Compared]:
    """Every published number of the rows that have a result."""
    compared = []
    for row in benchmark.rows:
        if row.key not in results:
            continue
        result = results[row.key]
        published = row.published_of.get(result["model"].removeprefix(VIT_SCHEMA), row.published)
        low, high = result["interval"]
        allowed = published.get(TOLERANCE, 0.0) + 50 * (high - low)
        compared += [
            Compared(row.key, metric, value, 100 * result["metrics"][metric], allowed)
            for metric, value in published.items()
            if metric != TOLERANCE
        ]
    return compared


def format_comparison(compared: Sequence[Compared]) -> str:
    lines = [f"{'':2}  {'dataset':16}{'metric':28}{'published':>10}{'here':>9}{'apart':>8}{'allowed':>9}"]
    lines += [
        f"{'ok' if each.agrees else '!!'}  {each.key:16}{each.metric:28}{each.published:10.2f}{each.value:9.2f}"
        f"{each.value - each.published:+8.2f}{each.allowed:9.2f}"
        for each in compared
    ]
    off = [each for each in compared if not each.agrees]
    lines.append(f"{len(compared) - len(off)} of {len(compared)} published numbers are reproduced")
    if off:
        lines.append(
            "what is off: see first whether the weights are OpenAI's with QuickGELU, then class names and templates "
            "(benchmark paper or wds), then the images (their digests above)"
        )
    return "\n".join(lines)
