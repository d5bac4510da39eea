"""The benchmark file: the meaning of a row, and all faults in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.config.templates import TEMPLATES
from pipeline.evaluation.datasets.benchmark import load_benchmark


def write(folder: Path, text: str, name: str = "bench.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_paths_are_relative_to_the_file_or_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAL_SETS", "/srv/sets")
    near = load_benchmark(write(tmp_path, "datasets: [{key: a, group: id, path: wds_a}]"))
    rooted = load_benchmark(write(tmp_path, "root: deep\ndatasets: [{key: a, group: id, path: wds_a}]", "b.yaml"))
    absolute = load_benchmark(
        write(tmp_path, "root: $EVAL_SETS\ndatasets: [{key: a, group: id, path: wds_a}]", "c.yaml")
    )
    assert near.rows[0].path == tmp_path / "wds_a"
    assert rooted.rows[0].path == tmp_path / "deep" / "wds_a"
    assert absolute.rows[0].path == Path("/srv/sets/wds_a")
    assert near.name == "bench"


def test_a_row_carries_overrides_and_its_metric(tmp_path: Path) -> None:
    write(tmp_path, "red fox\n  sea\n\nhill\n", "names.txt")
    text = """
name: mine
datasets:
  - {key: a, group: shift, path: a, classnames: names.txt, templates: simple, subset: [2, 0]}
  - {key: b, group: zero-shot, path: b, templates: ["a {c}."], in_mean: false}
  - {key: c, group: retrieval, path: c}
"""
    first, second, third = load_benchmark(write(tmp_path, text)).rows
    assert first.classnames == ("red fox", "sea", "hill")
    assert first.templates == TEMPLATES["simple"]
    assert first.subset == ((2,), (0,))
    assert (second.templates, second.in_mean) == (("a {c}.",), False)
    assert (first.metric, third.metric) == ("acc1", "mean_recall")


def test_a_row_may_be_like_one_of_another_benchmark(tmp_path: Path) -> None:
    write(
        tmp_path,
        "datasets: [{key: a, group: shift, path: wds_a, templates: simple, classnames: [x, y], subset: [1, 0], "
        "in_mean: false, published: {acc1: 5, tolerance: 1}}, {key: b, group: id, path: b}]",
        "all.yaml",
    )
    text = "root: /sets\ndatasets: [{key: a, like: all.yaml, group: id, in_mean: true, resize: squash}]"
    (row,) = load_benchmark(write(tmp_path, text)).rows
    (first, _) = load_benchmark(tmp_path / "all.yaml", "/sets").rows
    assert row == first.model_copy(update={"group": "id", "in_mean": True, "resize": "squash", "published": {}})
    for entry, message in (
        ("{key: c, like: all.yaml}", r"row c: like: all.yaml: 'c' is not in the benchmark; did you mean"),
        ("{key: a, like: 3}", "row a: like: should name a benchmark or a file, got 3"),
        ("{key: a, like: nothing}", "row a: benchmark: 'nothing' is neither a file nor one of paper"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_benchmark(write(tmp_path, f"datasets: [{entry}]"))


def test_the_vision_benchmark_has_the_papers_targets() -> None:
    """The vision benchmark has the targets as the paper reads them."""
    rows = {row.key: row for row in load_benchmark("vision", "/sets").rows}
    known = rows.pop("imagenet100")
    assert (known.group, known.images, known.classes) == ("source", 5000, 100)
    assert (known.bank, known.neighbours, known.temperature, known.resize) == ("train", 20, 0.07, 256)
    assert {key: (row.images, row.classes) for key, row in rows.items()} == {
        "cifar10": (10_000, 10), "cifar100": (10_000, 100), "food101": (25_250, 101), "pets": (3_669, 37),
        "flowers": (1_020, 102), "dtd": (1_880, 47),
    }  # fmt: skip
    paper = {row.key: row for row in load_benchmark("paper", "/sets").rows}
    for key, row in rows.items():
        assert (row.group, row.resize, row.published) == ("id", "squash", {})
        assert (row.licence, row.restriction) == (paper[key].licence, paper[key].restriction)
        assert (row.templates, row.classnames, row.spellings) == (
            paper[key].templates, paper[key].classnames, paper[key].spellings
        )  # fmt: skip
        assert row.metric == "acc1"


def test_a_benchmark_inherits_from_another(tmp_path: Path) -> None:
    write(tmp_path, "name: all\ndatasets: [{key: a, group: id, path: a}]", "all.yaml")
    child = load_benchmark(write(tmp_path, "base: all.yaml\nroot: /elsewhere"))
    assert child.rows[0].path == Path("/elsewhere/a")


def test_all_faults_are_listed_in_one_error(tmp_path: Path) -> None:
    text = """
colour: blue
datasets:
  - {key: a, group: id, path: a}
  - {key: A, group: id, path: b}
  - {key: c, group: fancy, path: c}
  - {key: "../d", group: id, path: d}
  - {key: e, group: id, pth: e}
  - {key: f, group: id, path: f, templates: ["no placeholder"]}
  - {key: g, group: retrieval, path: g, subset: [1]}
  - {key: h, group: id, path: h, classnames: [x, y], subset: [0, 2]}
  - {key: i, group: id, path: i, subset: [1, 1]}
  - {key: j, group: id, path: j, classnames: nowhere.txt}
  - {key: k, group: id, path: k, in_mean: "maybe"}
  - 17
"""
    with pytest.raises(ConfigError) as caught:
        load_benchmark(write(tmp_path, text))
    message = str(caught.value)
    for part in (
        "unknown key 'colour'",
        "key 'a' occurs in 2 rows",
        "row c: group",
        "row ../d: key",
        "unknown key 'pth'; did you mean 'path'?",
        "'no placeholder' has no {c}",
        "row g: a retrieval dataset has captions",
        "subset names class 2 of 2 classnames",
        "row i: subset must hold different class ids",
        "nowhere.txt",
        "row k: in_mean",
        "row number 12",
    ):
        assert part in message


@pytest.mark.parametrize("text", ["name: x", "datasets: []", "datasets: {a: 1}"])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="datasets"):
        load_benchmark(write(tmp_path, text))


def test_choosing_an_unknown_dataset_shows_near_names(tmp_path: Path) -> None:
    bench = load_benchmark(write(tmp_path, "datasets: [{key: clothing, group: id, path: a}]"))
    assert [row.key for row in bench.choose(["clothing"]).rows] == ["clothing"]
    with pytest.raises(ConfigError, match="'cloting' is not in the benchmark; did you mean clothing"):
        bench.choose(["cloting"])


def test_missing_directories_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    text = (
        "datasets: [{key: a, group: id, path: no1}, {key: b, group: id, path: there}, {key: c, group: id, path: no2}]"
    )
    with pytest.raises(ConfigError) as caught:
        load_benchmark(write(tmp_path, text)).check_paths()
    assert "2 datasets are missing" in str(caught.value)
    assert "a: no directory" in str(caught.value)
    assert "c: no directory" in str(caught.value)
