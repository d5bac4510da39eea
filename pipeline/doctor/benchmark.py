"""Checks of a benchmark: which datasets are present, and whether CLIP reaches its published numbers on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.config import VIT_SCHEMA, ConfigError
from pipeline.data.classnames import plain_name
from pipeline.data.originals.table import ORIGINALS
from pipeline.data.storage.cache import Cache
from pipeline.doctor.findings import Finding
from pipeline.evaluation.command import find_device, load_plain, progress
from pipeline.evaluation.datasets.benchmark import Benchmark, is_there
from pipeline.evaluation.datasets.dataset import Dataset, Settings, open_dataset
from pipeline.evaluation.datasets.rows import TOLERANCE, Row
from pipeline.evaluation.results import Result
from pipeline.evaluation.run import evaluate

# The model of the paper; its published numbers are in the rows of the benchmark.
GOLDEN_MODEL, GOLDEN_TAG = "ViT-B-16-quickgelu", "openai"


def check_rows(rows: Sequence[Row]) -> Iterator[Finding]:
    """Open the datasets one after the other, without decoding images; the last finding counts those that are ready."""
    ready = 0
    for row in rows:
        finding = check_row(row)
        ready += finding.ok
        yield finding
    yield Finding("ready", f"{ready} of {len(rows)} datasets", checked=False)


def check_row(row: Row) -> Finding:
    """The content of a row's directory, or why the row cannot be evaluated.

    The digest in the text covers images, labels and captions: equal digests on two machines mean equal data. For K-NN
    it covers the query images and the bank.
    """
    if not is_there(row):
        return Finding(row.key, "not found", f"put it into {row.path}, or create it with {_command(row)}")
    try:
        dataset = open_dataset(row)
    except ConfigError as error:
        return Finding(row.key, "cannot be evaluated", str(error).replace("\n", "; "))
    data, bank = dataset.data, dataset.bank
    counts = _counts(len(data), None if row.is_retrieval else dataset.classes, sum(map(len, data.captions)))
    if bank is not None:
        counts += f", bank of {len(bank)}"
    digest = data.digest if bank is None else f"{data.digest}+{bank.digest}"
    return Finding(row.key, _joined(counts, f"digest {digest}", _licence(row), _names_remark(dataset)))


def required_rows(rows: Sequence[Row]) -> Iterator[Finding]:
    """The required content of each row's directory and how to create it; no directory is opened."""
    for row in rows:
        known = ORIGINALS.get(row.key)
        place = f"ROOT/{Path(row.path).name}"
        if known is None:
            todo = f"put a clip-benchmark folder into {place}"
        else:
            todo = f"{_command(row, f'DIR {place}')}, where DIR holds {known.holds}"
        text = _joined(_counts(row.images, row.classes, row.texts), _licence(row))
        yield Finding(row.key, text, todo, checked=False)
    yield Finding("required", f"{len(rows)} datasets; --root ROOT checks each", checked=False)


def reproduce(benchmark: Benchmark, model: str | None, tag: str | None, out: Path) -> list[Finding]:
    """Evaluate an untouched model on the rows of a benchmark and compare the results with the published ones.

    Args:
        benchmark: a benchmark with at least one row that is ready.
        model: name of the model; None: `GOLDEN_MODEL`.
        tag: open_clip tag or weights file; None: `GOLDEN_TAG` for the golden model.
        out: directory for the results.
    """
    name = model or GOLDEN_MODEL
    clip = load_plain(name, tag or (GOLDEN_TAG if name == GOLDEN_MODEL else None))
    settings = Settings(device=find_device(None), cache=Cache.named(None))
    return compare_with_published(benchmark, evaluate(clip, benchmark, out, settings, say=progress).results)


def compare_with_published(benchmark: Benchmark, results: Mapping[str, Result]) -> list[Finding]:
    """Every published number of the rows with a result, in percent, and how many of them are reproduced.

    A value may differ by the number's tolerance plus half of the interval of a drawn sample.
    """
    findings = []
    for row in benchmark.rows:
        if row.key in results:
            findings += _compare_row(row, results[row.key])
    agreeing = sum(each.ok for each in findings)
    todo = (
        "check first that the weights are OpenAI's with QuickGELU, then class names and templates (benchmark paper or "
        "wds), then the images (their digests above)"
    )
    text = f"{agreeing} of {len(findings)} published numbers"
    return [*findings, Finding("reproduced", text, "" if agreeing == len(findings) else todo)]


def _compare_row(row: Row, result: Result) -> Iterator[Finding]:
    published = row.published_of.get(result["model"].removeprefix(VIT_SCHEMA), row.published)
    low, high = result["interval"]
    allowed = published.get(TOLERANCE, 0.0) + 50 * (high - low)
    for metric, expected in published.items():
        if metric == TOLERANCE:
            continue
        value = 100 * result["metrics"][metric]
        text = f"{metric} {value:.2f}, published {expected:.2f}, difference {value - expected:+.2f}"
        # Published numbers are rounded, so a value at the edge of the tolerance may be on either side.
        agrees = abs(value - expected) <= allowed + 1e-6
        yield Finding(row.key, text, "" if agrees else f"allowed is a difference of {allowed:.2f}")


def _command(row: Row, places: str = "") -> str:
    split = "" if row.split == "test" else f" --split {row.split}"
    return f"`selora pack --dataset {row.key}{split}{' ' + places if places else ''}`"


def _counts(images: int | None, classes: int | None, texts: int | None) -> str:
    counted = {"images": images, "classes": classes, "texts": texts}
    return ", ".join(f"{count} {name}" for name, count in counted.items() if count)


def _licence(row: Row) -> str:
    return _joined(row.licence, row.restriction)


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


def _names_remark(dataset: Dataset) -> str | None:
    """Differences beyond spelling between the row's class names and the directory's: labels may mean other classes."""
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
