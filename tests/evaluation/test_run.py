"""Evaluating the table: written, skipped, compared and refused results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import Config, ConfigError, override
from pipeline.data.eval.batches import eval_loader
from pipeline.data.eval.wds_layout import open_eval_set
from pipeline.data.images import normalize
from pipeline.data.storage.cache import Cache
from pipeline.evaluation.command import EvalRequest, evaluate_command
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings, batch_and_workers
from pipeline.evaluation.run import evaluate
from pipeline.evaluation.summary import format_summary
from pipeline.method.adapter import attach_adapter
from pipeline.model.clip import Clip, load_clip
from pipeline.model.restore import find_run
from pipeline.model.towers import adapter_targets
from pipeline.runs.results import read_summary

SETTINGS = Settings(batch_size=16, workers=0)
FOUR = ["ours", "moved", "few", "pairs"]


@pytest.fixture
def clip(trained_clip_dir: Path) -> Clip:
    return load_clip(f"local-dir:{trained_clip_dir}")


def bench(folder: Path, *rows: str) -> Path:
    file = folder / "bench.yaml"
    file.write_text("datasets:\n" + "".join(f"  - {{{row}}}\n" for row in rows))
    return file


def test_a_second_call_reads_no_image_again(
    tmp_path: Path, clip: Clip, benchmark_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = load_benchmark(benchmark_file)
    lines: list[str] = []
    first = evaluate(clip, table, tmp_path / "out", SETTINGS, say=lines.append)
    assert first.skipped == []
    assert [line.split(":")[0] for line in lines] == FOUR
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.json")}
    monkeypatch.setattr("pipeline.data.eval.batches.decode", None)  # whoever decodes an image now fails
    lines.clear()
    second = evaluate(clip, table, tmp_path / "out", SETTINGS, say=lines.append)
    assert second.skipped == FOUR
    assert all("skipped" in line for line in lines)
    assert second.results == first.results
    assert all(file.stat().st_mtime_ns == time for file, time in written.items() if file.name != "summary.json")
    with pytest.raises(TypeError):
        evaluate(clip, table, tmp_path / "out", SETTINGS, skip_done=False)


@pytest.mark.parametrize("change", ["weights", "precision", "limit", "classname", "torn"])
def test_a_result_of_something_else_is_computed_anew(
    tmp_path: Path, clip: Clip, make_classification: Callable[..., Path], change: str
) -> None:
    make_classification(tmp_path / "wds_a", n=12, shards=1)
    table, out = load_benchmark(bench(tmp_path, "key: a, group: id, path: wds_a")), tmp_path / "out"
    evaluate(clip, table, out, SETTINGS)
    settings = SETTINGS
    if change == "weights":
        with torch.no_grad():
            clip.model.get_parameter("visual.proj")[0] += 1
    elif change == "precision":
        settings = Settings(batch_size=16, workers=0, precision="bf16")
    elif change == "limit":
        settings = Settings(batch_size=16, workers=0, limit=5)
    elif change == "classname":
        names = tmp_path / "wds_a" / "classnames.txt"
        names.write_text(names.read_text().replace("goat", "gnu"))
    else:
        (out / "a.json").write_text((out / "a.json").read_text()[:50])
    again = evaluate(clip, table, out, settings)
    assert again.skipped == []
    assert json.loads((out / "a.json").read_text()) == again.results["a"]
    assert evaluate(clip, table, out, settings).skipped == ["a"]


def test_a_second_model_takes_kept_images_and_scores_the_same(tmp_path: Path, clip: Clip, benchmark_file: Path) -> None:
    table, keeping = load_benchmark(benchmark_file), replace(SETTINGS, cache=Cache(tmp_path / "cache", 10**9))

    def scores(settings: Settings, name: str) -> dict[str, dict[str, object]]:
        results = evaluate(clip, table, tmp_path / name, settings).results
        return {key: {**result, "seconds": None} for key, result in results.items()}

    assert scores(keeping, "kept") == scores(SETTINGS, "plain")
    files = list((tmp_path / "cache" / "files").glob("*/*.pixels"))
    assert len(files) == len(table.rows)
    times = {file: file.stat().st_mtime_ns for file in files}
    with torch.no_grad():
        clip.model.get_parameter("visual.proj").mul_(-1)
    assert scores(keeping, "other kept") == scores(SETTINGS, "other plain")
    assert all(file.stat().st_mtime_ns > time for file, time in times.items())


def test_finished_datasets_stay_in_the_summary(tmp_path: Path, clip: Clip, benchmark_file: Path) -> None:
    """Chosen datasets are run and finished ones stay in the summary."""
    table = load_benchmark(benchmark_file)
    first = evaluate(clip, table, tmp_path, SETTINGS, datasets=["few"])
    assert list(first.results) == ["few"]
    assert first.summary["groups"].keys() == {"zero-shot"}
    second = evaluate(clip, table, tmp_path, SETTINGS, datasets=["ours"])
    assert (list(second.results), second.skipped) == (["ours", "few"], [])
    assert "moved" not in {file.stem for file in tmp_path.glob("*.json")}
    with pytest.raises(ConfigError, match="did you mean moved"):
        evaluate(clip, table, tmp_path, SETTINGS, datasets=["movd"])


def test_a_limit_takes_samples_from_the_whole_set(tmp_path: Path, clip: Clip, benchmark_file: Path) -> None:
    settings = Settings(batch_size=16, workers=0, limit=10)
    outcome = evaluate(clip, load_benchmark(benchmark_file), tmp_path, settings)
    assert {result["n"] for result in outcome.results.values()} == {10}
    assert outcome.summary["limit"] == 10


def test_a_diverged_model_has_no_accuracy(tmp_path: Path, clip: Clip, benchmark_file: Path) -> None:
    with torch.no_grad():
        clip.model.get_parameter("visual.proj")[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        evaluate(clip, load_benchmark(benchmark_file), tmp_path, SETTINGS)


def test_a_corrupt_image_is_named_and_never_dropped(tmp_path: Path, clip: Clip, broken_set: Path) -> None:
    table = load_benchmark(bench(tmp_path, f"key: broken, group: id, path: {broken_set}"))
    with pytest.raises(ConfigError, match=r"s0000011"):
        evaluate(clip, table, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out" / "broken.json").exists()


def test_subset_and_overrides_equal_a_plain_reference(
    tmp_path: Path, clip: Clip, make_classification: Callable[..., Path]
) -> None:
    """60 names, of which the labels mean twelve: as ImageNet-A stands to ImageNet."""
    folder = make_classification(tmp_path / "wds_a", n=40, seed=8)
    names = [f"thing {i}" for i in range(60)]
    subset = [5, 59, 17, 41, 25, 0, 48, 12, 31, 7, 36, 20]
    for label, name in zip(subset, open_eval_set(folder).classnames or (), strict=True):
        names[label] = name
    (tmp_path / "names.txt").write_text("\n".join(names))
    overrides = f"classnames: names.txt, templates: ['a {{c}}', 'one {{c}}.'], subset: {subset}"
    row = f"key: a, group: shift, path: wds_a, {overrides}"
    result = evaluate(clip, load_benchmark(bench(tmp_path, row)), tmp_path / "out", SETTINGS).results["a"]

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    model: Any = clip.model
    with torch.no_grad():
        head = []
        for name in names:
            prompts = unit(model.encode_text(clip.tokenizer([f"a {name}", f"one {name}."])).double().numpy())
            head.append(unit(prompts.mean(axis=0)))
        config, right, recalls = clip.preprocess_cfg, 0, [[] for _ in subset]
        for batch in eval_loader(open_eval_set(folder), config, batch_size=1, workers=0):
            pixels = normalize(batch.images, config["mean"], config["std"])
            logits = np.array(head) @ unit(model.encode_image(pixels)[0].double().numpy())
            label = int(batch.labels)
            hit = int(np.argmax(logits[subset])) == label
            right += hit
            recalls[label].append(hit)
    assert result["metrics"]["acc1"] == right / 40
    assert result["metrics"]["mean_per_class_recall"] == pytest.approx(np.mean([np.mean(r) for r in recalls if r]))
    assert (result["classes"], result["chance"]) == (12, 1 / 12)
    assert result["per_class_recall"] == [np.mean(r) if r else None for r in recalls]
    assert 0 < right < 40


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("key: a, group: retrieval, path: wds_a", "holds a classification dataset"),
        ("key: a, group: id, path: wds_a, subset: [0, 1, 2]", r"has label \d+, but the row leaves 3 classes"),
        ("key: a, group: id, path: wds_a, subset: [0, 40]", "subset names class 40 of 12 classes"),
        ("key: a, group: id, path: nowhere", "a: no directory"),
        ("key: a, group: id, path: empty", "nshards.txt"),
        ("key: a, group: id, path: no_templates", "a: no templates"),
    ],
)
def test_a_row_that_does_not_fit_its_directory_is_refused(
    tmp_path: Path, clip: Clip, make_classification: Callable[..., Path], row: str, message: str
) -> None:
    make_classification(tmp_path / "wds_a", n=30, shards=1)
    shutil.copytree(tmp_path / "wds_a", tmp_path / "no_templates")
    (tmp_path / "no_templates" / "zeroshot_classification_templates.txt").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        evaluate(clip, load_benchmark(bench(tmp_path, row)), tmp_path / "out", SETTINGS)


def test_a_missing_shard_is_refused(tmp_path: Path, clip: Clip, make_classification: Callable[..., Path]) -> None:
    make_classification(tmp_path / "wds_a", n=12, shards=3)
    (tmp_path / "wds_a" / "test" / "1.tar").unlink()
    with pytest.raises(ConfigError, match=r"1\.tar"):
        evaluate(clip, load_benchmark(bench(tmp_path, "key: a, group: id, path: wds_a")), tmp_path / "out", SETTINGS)


def test_a_model_with_blocks_left_is_refused(tmp_path: Path, clip: Clip, benchmark_file: Path) -> None:
    attach_adapter(adapter_targets(clip.model), rank=2)
    with pytest.raises(ValueError, match="not merged"):
        evaluate(clip, load_benchmark(benchmark_file), tmp_path, SETTINGS)


def test_bf16_stays_close_to_fp32(tmp_path: Path, clip: Clip, benchmark_file: Path) -> None:
    table = load_benchmark(benchmark_file)
    exact = evaluate(clip, table, tmp_path / "a", SETTINGS).results
    rough = evaluate(clip, table, tmp_path / "b", Settings(batch_size=16, workers=2, precision="bf16")).results
    for key in FOUR:
        assert rough[key]["precision"] == "bf16"
        assert rough[key]["value"] == pytest.approx(exact[key]["value"], abs=0.12)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", (None, None), (64, 2)),
        ("cuda", (None, None), (512, 7)),
        ("cuda", (8, 0), (8, 0)),
    ],
)
def test_batch_and_workers_follow_the_device(
    device: str, given: tuple[int | None, int | None], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card a rank decodes on its share of the cores, less one."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert batch_and_workers(torch.device(device), *given) == expected


def test_the_precision_is_the_runs_unless_given() -> None:
    config = override(Config.model_validate({"data": {"train": "x"}}), {"eval.precision": "bf16", "eval.workers": 5})
    assert EvalRequest(device="cpu").settings(None).precision == "fp32"
    assert EvalRequest(device="cpu").settings(config).precision == "bf16"
    assert EvalRequest(device="cpu", precision="fp32").settings(config).precision == "fp32"
    assert EvalRequest(device="cpu").settings(config).workers == 5


def test_a_run_is_compared_with_its_untouched_base(
    tmp_path: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "mine", kind="full")
    assert evaluate_command(run, EvalRequest(cache=str(tmp_path / "kept"))) == 0
    assert len(list((tmp_path / "kept" / "files").glob("*/*.pixels"))) == len(FOUR)
    printed = capsys.readouterr()
    assert "untouched model: ours" in printed.err
    assert "forgetting" in printed.out
    base = read_summary(tmp_path / "runs" / "baselines" / find_run(run).base_digest[:16])
    mine = read_summary(run / "eval")
    assert mine["pretrained"] == "mine/step-00000020"
    assert mine["model_digest"] != base["model_digest"] == base["base_digest"] == mine["base_digest"]
    for key in FOUR:
        each = mine["datasets"][key]
        assert each["baseline"] == base["datasets"][key]["value"]
        assert each["change"] == pytest.approx(each["value"] - each["baseline"])
    drops = [
        base["groups"][group]["mean"] - mine["groups"][group]["mean"] for group in ("shift", "zero-shot", "retrieval")
    ]
    assert mine["forgetting"] == pytest.approx(sum(drops) / 3)
    assert base["forgetting"] is None
    journal = (run / "journal.jsonl").read_text()
    for name in ("eval/ours/acc1", "eval/pairs/text_retrieval_recall_at_5", "eval/mean/shift", "eval/forgetting"):
        assert f'"{name}"' in journal
    assert "eval/few/acc5" not in journal, "three classes have no acc5"
    evaluate_command(run, EvalRequest())
    assert capsys.readouterr().err.count("skipped") == 8


def test_a_run_without_its_base_or_benchmark_says_so(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="brings its own weights"):
        evaluate_command(run, EvalRequest(pretrained="openai"))
    config = run / "config.yaml"
    lines = [line for line in config.read_text().splitlines() if "benchmark" not in line]
    config.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="name a benchmark"):
        evaluate_command(run, EvalRequest())


def test_a_plain_directory_and_a_plain_name_are_evaluated(
    tmp_path: Path, trained_clip_dir: Path, benchmark_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (str(trained_clip_dir), f"local-dir:{trained_clip_dir}"):
        out = tmp_path / name.partition(":")[0].strip("/").replace("/", "_")
        assert evaluate_command(name, EvalRequest(benchmark=benchmark_file, out=out, workers=0, datasets=["few"])) == 0
        assert json.loads((out / "few.json").read_text())["metric"] == "acc1"
    assert "few" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="neither a run"):
        evaluate_command(str(tmp_path), EvalRequest(benchmark=benchmark_file))
    with pytest.raises(ConfigError, match="near: ViT-B-32"):
        evaluate_command("ViT-B-33", EvalRequest(benchmark=benchmark_file))
    with pytest.raises(ConfigError, match="device='tpu9'"):
        evaluate_command(str(trained_clip_dir), EvalRequest(benchmark=benchmark_file, device="tpu9"))


def test_the_table_for_the_terminal_shows_every_number(tmp_path: Path, clip: Clip, benchmark_file: Path) -> None:
    outcome = evaluate(clip, load_benchmark(benchmark_file), tmp_path, SETTINGS)
    text = format_summary(outcome.summary)
    for key in FOUR:
        assert f"{100 * outcome.results[key]['value']:.2f}" in text
        assert key in text
    assert outcome.summary.items() <= read_summary(tmp_path).items()
