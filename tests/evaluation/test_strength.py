"""Between the untouched and the fine-tuned model: the ends are those models, the middle is the formula, and the images
are decoded once for all strengths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.data.eval.batches
from pipeline.config import ConfigError
from pipeline.data.storage.cache import Cache
from pipeline.evaluation.command import EvalRequest, evaluate_command
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.run import evaluate, evaluate_run
from pipeline.evaluation.strength import evaluate_strength
from pipeline.model.between import Between
from pipeline.model.restore import find_run, load_base, load_run
from pipeline.model.weights import stock_state, weights_digest

SETTINGS = Settings(batch_size=16, workers=0)
SETS = ("ours", "moved", "few", "pairs")
# What says how a result came about and not what it is.
NOT_THE_RESULT = ("seconds", "pretrained")


def numbers(folder: Path, key: str) -> dict[str, Any]:
    result = json.loads((folder / f"{key}.json").read_text())
    return {name: value for name, value in result.items() if name not in NOT_THE_RESULT}


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_ends_of_the_curve_are_exact(
    tmp_path: Path, make_run: Callable[..., Path], benchmark_file: Path, trained_clip_dir: Path, kind: str
) -> None:
    """The ends are the untouched and the fine tuned model bit for bit."""
    run, table = make_run(tmp_path / "run", kind=kind, model=trained_clip_dir), load_benchmark(benchmark_file)
    # Elsewhere, so that nothing can be taken over: the curve computes its ends itself.
    curve = evaluate_strength(
        run, table, tmp_path / "curve", SETTINGS, baselines=tmp_path / "none", alphas=(0.0, 0.5, 1.0)
    )
    evaluate(load_base(find_run(run)), table, tmp_path / "base", SETTINGS)
    evaluate(load_run(run), table, tmp_path / "tuned", SETTINGS)
    for key in SETS:
        assert numbers(tmp_path / "curve" / "strength" / "0", key) == numbers(tmp_path / "base", key)
        assert numbers(tmp_path / "curve" / "strength" / "1", key) == numbers(tmp_path / "tuned", key)
        digests = {numbers(tmp_path / "curve" / "strength" / a, key)["model_digest"] for a in ("0", "0.5", "1")}
        assert len(digests) == 3
    assert curve == json.loads((tmp_path / "curve" / "strength.json").read_text())
    assert curve["alphas"] == [0, 0.5, 1]
    assert curve["kept"]["0.0"] == 1 and 0 < curve["kept"]["1.0"] <= 1
    assert curve["groups"]["1.0"].keys() == {"id", "shift", "zero-shot", "retrieval"}
    assert curve["datasets"]["0.0"]["few"] == numbers(tmp_path / "base", "few")["value"]


def test_the_middle_mixes_the_merged_weights(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run", kind="dora")
    base, tuned = load_base(find_run(run)), load_run(run)
    start, end = base.model.state_dict(), tuned.model.state_dict()
    end = {name: value.clone() for name, value in end.items()}
    between = Between.of(base, tuned)
    moved = [name for name in start if not torch.equal(start[name], end[name])]
    assert 0 < len(moved) < len(start)
    assert set(moved) == set(between.moved)
    for alpha, ends in ((1, end), (0, start), (1, end)):
        assert all(torch.equal(value, ends[name]) for name, value in between.at(alpha).model.state_dict().items())
    mixed = between.at(0.3).model.state_dict()
    for name, value in mixed.items():
        torch.testing.assert_close(value, start[name] + 0.3 * (end[name] - start[name]))
        assert (name in moved) != torch.equal(value, start[name])
    assert weights_digest(stock_state(base.model)) == base.digest, "the untouched model stays as it is"


def test_a_curve_decodes_once_and_is_continued(
    tmp_path: Path, make_run: Callable[..., Path], benchmark_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven strengths decode each image once, and an interrupted curve continues."""
    shutil.copytree(benchmark_file.parent, tmp_path / "sets")
    run, table = make_run(tmp_path / "run"), load_benchmark(tmp_path / "sets" / benchmark_file.name)
    plain, decoded = pipeline.data.eval.batches.decode, []

    def counted(data: bytes, **options: Any) -> Any:
        decoded.append(len(data))
        return plain(data, **options)

    monkeypatch.setattr(pipeline.data.eval.batches, "decode", counted)
    chosen = {"baselines": tmp_path / "baselines", "datasets": ["ours", "few"]}
    cache = Cache(tmp_path / "cache", 2**30)
    first = evaluate_strength(run, table, run / "eval", replace(SETTINGS, cache=cache), **chosen)
    assert len(first["alphas"]) == 11
    assert len(decoded) == 57 + 20
    (run / "eval" / "strength" / "0.4" / "few.json").unlink()
    assert evaluate_strength(run, table, run / "eval", SETTINGS, **chosen)["groups"] == first["groups"]
    assert len(decoded) == 57 + 20 + 20, "one set of one model was missing"


def test_what_was_evaluated_before_is_taken_over(
    tmp_path: Path, make_run: Callable[..., Path], benchmark_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, table = make_run(tmp_path / "run"), load_benchmark(benchmark_file)
    evaluate_run(run, table, run / "eval", SETTINGS, baselines=tmp_path / "baselines")
    monkeypatch.setattr(pipeline.data.eval.batches, "decode", None)  # whoever decodes an image now fails
    ends = {"baselines": tmp_path / "baselines", "alphas": (0.0, 1.0)}
    curve = evaluate_strength(run, table, run / "eval", SETTINGS, **ends)
    summary = json.loads((run / "eval" / "summary.json").read_text())
    for group, found in summary["groups"].items():
        assert curve["groups"]["1.0"][group] == found["mean"]
        assert curve["groups"]["0.0"][group] == pytest.approx(found["mean"] - found["change"])


def test_the_command_prints_the_curve(
    tmp_path: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    evaluate_command(run, EvalRequest(strength=(0.0, 0.5)))
    printed = capsys.readouterr().out
    assert "0.5" in printed
    assert "zero-shot" in printed
    journal = (run / "journal.jsonl").read_text()
    assert '"strength/zero-shot"' in journal
    assert '"eval/strength.json"' in journal
    with pytest.raises(ConfigError, match="above 0"):
        evaluate_command(run, EvalRequest(strength=(1.5,)))
    with pytest.raises(ConfigError, match="is not a run"):
        evaluate_command("ViT-B-32", EvalRequest(strength=(0.5,)))
