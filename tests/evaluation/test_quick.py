"""Parts drawn by seed, with intervals; rows with their own names, counts and places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.evaluation.datasets.benchmark import load_benchmark, shipped_benchmarks
from pipeline.evaluation.datasets.dataset import Settings, open_dataset
from pipeline.evaluation.measures.metrics import interval
from pipeline.evaluation.run import evaluate
from pipeline.evaluation.summary import format_summary
from pipeline.model.clip import load_clip

SETTINGS = Settings(batch_size=16, workers=0)


def bench(folder: Path, text: str) -> Path:
    file = folder / "bench.yaml"
    file.write_text(text)
    return file


def test_a_sample_is_drawn_by_seed_and_carries_an_interval(
    tmp_path: Path, trained_clip_dir: Path, benchmark_file: Path
) -> None:
    drawn = f"include: {benchmark_file}\nroot: {benchmark_file.parent}\nsample: 25\n"
    table = load_benchmark(bench(tmp_path, drawn))
    opened = {row.key: open_dataset(row) for row in table.rows}
    again = {row.key: open_dataset(row) for row in load_benchmark(tmp_path / "bench.yaml").rows}
    other = {row.key: open_dataset(row) for row in load_benchmark(bench(tmp_path, drawn + "seed: 1\n")).rows}
    chosen = list(opened["ours"].chosen or ())
    assert (len(chosen), len(set(chosen)), chosen == sorted(chosen)) == (25, 25, True)
    assert chosen == again["ours"].chosen != other["ours"].chosen
    assert opened["ours"].digest == again["ours"].digest != other["ours"].digest
    assert opened["few"].chosen is None, "it has 20 images only"
    outcome = evaluate(load_clip(f"local-dir:{trained_clip_dir}"), table, tmp_path / "out", SETTINGS)
    ours, few = outcome.results["ours"], outcome.results["few"]
    assert (ours["n"], ours["total"], few["n"]) == (25, 57, 20)
    assert ours["interval"][0] < ours["value"] < ours["interval"][1]
    assert few["interval"] == [few["value"], few["value"]]
    text = format_summary(outcome.summary)
    assert f"{100 * ours['interval'][0]:.1f}..{100 * ours['interval'][1]:.1f}" in text


def test_the_interval_covers_as_often_as_it_says() -> None:
    """The interval holds the whole sets value as often as it says."""
    draw, total, n, misses = np.random.default_rng(0), 5000, 1000, 0
    for truth in (0.02, 0.3, 0.5, 0.97):
        hits = np.arange(total) < truth * total
        for _ in range(500):
            low, high = interval(hits[draw.permutation(total)[:n]].mean(), n, total)
            misses += not low <= truth <= high
    assert 0.03 < misses / 2000 < 0.07
    assert interval(0.5, 999, 1000)[1] - 0.5 < 0.002
    assert interval(0.5, 1000, 1000) == [0.5, 0.5]


def test_spellings_that_collide_are_refused(tmp_path: Path, make_classification: Callable[..., Path]) -> None:
    make_classification(tmp_path / "wds_a", n=8, classnames=("犬", "猫", "T-shirt"), shards=1)
    row = "{key: a, group: id, path: wds_a, spellings: %s}"
    [found] = load_benchmark(bench(tmp_path, f"datasets: [{row % ['t-shirt', '猫', '犬']}]")).rows
    assert open_dataset(found).classnames == ("犬", "猫", "t-shirt")
    [twice] = load_benchmark(bench(tmp_path, f"datasets: [{row % ['t-shirt', 'T shirt', '猫', '犬']}]")).rows
    with pytest.raises(ConfigError, match="a: spellings: the class names 't-shirt' and 'T shirt'"):
        open_dataset(twice)


def test_spellings_follow_the_order_of_the_directory(tmp_path: Path, make_classification: Callable[..., Path]) -> None:
    make_classification(tmp_path / "wds_a", n=8, classnames=("red_fox", "bow window indoor", "T-shirt"), shards=1)
    row = "{key: a, group: id, path: wds_a, spellings: %s}"
    names = ["t-shirt", "red fox", "bow window/indoor"]
    [found] = load_benchmark(bench(tmp_path, f"datasets: [{row % names}]")).rows
    assert open_dataset(found).classnames == ("red fox", "bow window/indoor", "t-shirt")
    [short] = load_benchmark(bench(tmp_path, f"datasets: [{row % names[:2]}]")).rows
    with pytest.raises(ConfigError, match="'bow window indoor' in classnames.txt .* no such class"):
        open_dataset(short)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("images: 9", r"a: 8 images in .* where 9 are expected: probably shards are missing"),
        ("images: 7", r"8 images .* where 7 are expected: probably another version or split"),
        ("images: 7, known_counts: {8: these are the training images}", "these are the training images"),
        ("classes: 4", r"3 lines in classnames.txt of .* where 4 are expected"),
        ("classnames: [a, b], classes: 3", r"has label 2, but the row leaves 2 classes|2 class names where 3"),
    ],
)
def test_other_counts_than_the_rows_are_refused(
    tmp_path: Path, make_classification: Callable[..., Path], more: str, message: str
) -> None:
    make_classification(tmp_path / "wds_a", n=8, classnames=("x", "y", "z"), shards=1)
    [row] = load_benchmark(bench(tmp_path, f"datasets: [{{key: a, group: id, path: wds_a, {more}}}]")).rows
    with pytest.raises(ConfigError, match=message):
        open_dataset(row)


def test_own_rows_join_a_shipped_benchmark(tmp_path: Path) -> None:
    text = """
name: ours
include: paper
root: /data
images: {pets: 100}
datasets:
  - {key: trees, group: zero-shot, path: wds_trees, in_mean: false, metric: mean_per_class_recall}
  - {key: birds, group: shift, path: "s3://bucket/wds_birds", classnames: imagenet, subset: [7, [8, 9]]}
"""
    rows = {row.key: row for row in load_benchmark(bench(tmp_path, text)).rows}
    assert len(rows) == 18 + 2
    assert rows["imagenet"].path == Path("/data/wds_imagenet1k")
    assert (rows["pets"].images, rows["dtd"].images) == (100, 1880)
    assert rows["trees"].metric == "mean_per_class_recall"
    assert (rows["birds"].path, rows["birds"].subset) == ("s3://bucket/wds_birds", ((7,), (8, 9)))
    assert len(rows["birds"].classnames or ()) == 1000


def test_mode_wds_takes_names_and_rules_of_the_directory() -> None:
    """Mode wds leaves names templates and rules to the directory."""
    paper, shipped = load_benchmark("paper", "/data"), load_benchmark("wds", "/data")
    assert [row.key for row in paper.rows] == [row.key for row in shipped.rows]
    for row in shipped.rows:
        assert (row.classnames, row.spellings, row.templates, row.subset, row.border) == (None, None, None, None, 0)
    assert {row.sample for row in load_benchmark("quick", "hf:clip-benchmark").rows} == {1000}
    assert load_benchmark("quick", "hf:clip-benchmark").rows[0].path == "hf:clip-benchmark/wds_imagenet1k"


def test_every_shipped_benchmark_is_sound_and_needs_a_root() -> None:
    """Every shipped benchmark is sound and wants to know its root."""
    assert {"paper", "quick", "wds", "demo"} <= shipped_benchmarks().keys()
    for name in shipped_benchmarks():
        assert load_benchmark(name, "/data").rows
    for name in ("paper", "quick", "wds"):
        with pytest.raises(ConfigError, match="name the directory of its datasets"):
            load_benchmark(name)
    with pytest.raises(ConfigError, match="'papers' is neither a file nor one of paper, quick, vision, wds, demo"):
        load_benchmark("papers")


def test_faults_of_the_whole_file_are_listed_together(tmp_path: Path) -> None:
    text = """
mode: fancy
sample: 0
seed: no
images: {b: 3, a: 0}
datasets:
  - {key: a, group: id, path: a, metric: mean_recall}
  - {key: a, group: id, path: a, published: {acc1: 50}}
  - {key: a, group: id, path: a, classnames: [x], spellings: [x]}
  - {key: c, group: retrieval, path: a, classes: 3}
  - {key: d, group: id, path: a, texts: 3}
"""
    with pytest.raises(ConfigError) as caught:
        load_benchmark(bench(tmp_path, text))
    for part in (
        "mode: 'fancy' is none of paper, wds",
        "sample: 0 should be a whole number above 0",
        "seed: 'no' should be",
        "images: 'b' is not in the benchmark",
        "metric 'mean_recall' is none of group 'id'",
        "published should hold some of",
        "give classnames (in label order) or spellings",
        "a retrieval dataset has captions",
        "texts are counted in a retrieval dataset only",
    ):
        assert part in str(caught.value)


def test_a_key_that_stands_twice_in_a_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path is given twice"):
        load_benchmark(bench(tmp_path, "datasets:\n  - key: a\n    group: id\n    path: x\n    path: y\n"))
