"""The findings and the advice of doctor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_servers import QuietHandler, serving

from pipeline.cli.main import main
from pipeline.doctor.benchmark import check_row, compare_with_published
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.run import evaluate
from pipeline.model.clip import load_clip


@pytest.fixture
def sets(tmp_path: Path, datasets: Path) -> Path:
    shutil.copytree(datasets, tmp_path / "sets")
    (tmp_path / "sets" / "wds_shift" / "test" / "1.tar").unlink()
    (tmp_path / "sets" / "bench.yaml").write_text(
        "datasets:\n"
        "  - {key: ours, group: id, path: wds_id, images: 57, classes: 12, licence: ours, restriction: keep it}\n"
        "  - {key: moved, group: shift, path: wds_shift}\n"
        "  - {key: few, group: zero-shot, path: wds_few, images: 21}\n"
        "  - {key: gone, group: zero-shot, path: wds_gone}\n"
        "  - {key: pairs, group: retrieval, path: wds_pairs}\n"
        "  - {key: renamed, group: zero-shot, path: wds_few, classnames: [bear, cup, apple]}\n"
    )
    return tmp_path / "sets"


def test_each_dataset_is_found_or_named_with_what_to_do(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--benchmark", str(sets / "bench.yaml")]) == 1
    text = capsys.readouterr().out
    lines = {line.split()[1]: line for line in text.splitlines() if line[:2] in ("ok", "!!")}
    assert {key: line[:2] for key, line in lines.items()} == {
        "ours": "ok", "moved": "!!", "few": "!!", "gone": "!!", "pairs": "ok", "renamed": "ok",
    }  # fmt: skip
    assert "57 images, 12 classes; digest " in lines["ours"]
    assert "ours; keep it" in lines["ours"]
    assert "1.tar" in text
    assert "20 images in" in text and "where 21 are expected" in text
    assert "or create it with `selora pack --dataset gone`" in text
    assert "3 of 3 names in classnames.txt differ, first 'apple' where the row has 'bear'" in text
    assert "in another order?" in text
    assert text.splitlines()[-1] == "    ready    3 of 6 datasets"


def test_equal_data_have_equal_digests_wherever_they_lie(tmp_path: Path, datasets: Path) -> None:
    shutil.copytree(datasets / "wds_few", tmp_path / "copy" / "wds_few")
    text = "datasets: [{key: a, group: id, path: wds_few}]"
    found = []
    for folder in (datasets, tmp_path / "copy"):
        (tmp_path / "b.yaml").write_text(text)
        found.append(check_row(load_benchmark(tmp_path / "b.yaml", folder).rows[0]).text)
    assert found[0] == found[1]
    assert "digest" in found[0]


def test_golden_flags_what_is_further_off_than_its_tolerance(
    tmp_path: Path, datasets: Path, trained_clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bench(published: dict[str, float]) -> Path:
        file = tmp_path / "bench.yaml"
        rows = [
            f"{{key: {key}, group: {group}, path: {path}, "
            f"published: {{{metric}: {published[key]:.2f}, tolerance: 0.1}}}}"
            for key, group, path, metric in (
                ("ours", "id", "wds_id", "acc1"),
                ("pairs", "retrieval", "wds_pairs", "text_retrieval_recall@5"),
            )
        ]
        file.write_text(f"root: {datasets}\ndatasets:\n" + "".join(f"  - {row}\n" for row in rows))
        return file

    clip = load_clip(f"local-dir:{trained_clip_dir}")
    table = load_benchmark(bench({"ours": 0, "pairs": 0}))
    results = evaluate(clip, table, tmp_path / "out", Settings(workers=0)).results
    right = {
        "ours": 100 * results["ours"]["metrics"]["acc1"],
        "pairs": 100 * results["pairs"]["metrics"]["text_retrieval_recall@5"],
    }
    assert all(each.ok for each in compare_with_published(load_benchmark(bench(right)), results))
    off = compare_with_published(load_benchmark(bench(right | {"pairs": right["pairs"] - 0.3})), results)
    assert [each.ok for each in off] == [True, False, False]
    assert off[2].text == "1 of 2 published numbers"
    assert "QuickGELU" in off[2].todo
    command = ["doctor", "--benchmark", str(tmp_path / "bench.yaml"), "--golden", str(trained_clip_dir)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "!!  pairs" in printed.out
    assert printed.err.count("finished before, skipped") == 2


class Healthy(QuietHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


@pytest.fixture
def server() -> Iterator[str]:
    with serving(Healthy) as address:
        yield f"http://{address}"


def test_a_machine_and_a_config_that_are_well_have_nothing_to_do(
    tmp_path: Path,
    server: str,
    image_folder: Callable[..., Path],
    benchmark_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pack", str(image_folder(classes=2, each=3)), str(tmp_path / "shards")]) == 0
    config = tmp_path / "config.yaml"
    config.write_text(
        f"out: {tmp_path}\ndata: {{train: {tmp_path / 'shards'}}}\ntracking: {{uri: '{server}'}}\n"
        f"eval: {{benchmark: {benchmark_file}}}\n"
    )
    capsys.readouterr()
    assert main(["doctor", str(config)]) == 0
    text = capsys.readouterr().out
    assert "!!" not in text
    for part in ("selora", "torch", "GPU", "gloo", "GiB free", "answers", "6 samples", "4 datasets found"):
        assert part in text
    broken = ["tracking.uri=http://127.0.0.1:9", f"data.train={tmp_path / 'none'}"]
    assert main(["doctor", str(config), *broken, "eval.benchmark=papers"]) == 1
    text = capsys.readouterr().out
    for part in ("track sync", "`selora pack SOURCE", "'papers' is neither a file"):
        assert part in text


def test_options_without_their_benchmark_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--golden"]) == 2
    assert "name it with --benchmark" in capsys.readouterr().err


def test_without_a_root_the_datasets_are_listed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--benchmark", "paper"]) == 0
    text = capsys.readouterr().out
    assert "imagenetv2       10000 images, 1000 classes; MIT (repository)" in text
    assert "`selora pack --dataset imagenet-a DIR ROOT/wds_imagenet-a`, where DIR holds the 200 wnid folders" in text
    assert text.splitlines()[-1].split() == ["required", "18", "datasets;", "--root", "ROOT", "checks", "each"]
    assert main(["doctor", "--benchmark", "paper", "--golden"]) == 2
    assert "--root DIR" in capsys.readouterr().err
