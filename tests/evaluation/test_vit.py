"""A ViT with a classifier on a benchmark: its own classes, K-NN on its source set, and the reason for skipped rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

import pipeline.evaluation.checkpoints
from pipeline.config import ConfigError, load_config, to_yaml
from pipeline.data.eval.wds_layout import open_eval_set
from pipeline.evaluation.checkpoints import evaluate_checkpoints
from pipeline.evaluation.command import EvalRequest, evaluate_command
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings, open_dataset
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.passes import Subject
from pipeline.evaluation.run import evaluate_run
from pipeline.evaluation.strength import evaluate_strength
from pipeline.model.restore import load_run
from pipeline.model.vit import Vit, save_timm
from pipeline.selection.ranking import point_of

SETTINGS = Settings(batch_size=16, workers=0)


@pytest.fixture(scope="session")
def table(datasets: Path, known_set: Path) -> Path:
    assert known_set.name == "wds_known"
    file = datasets / "vision.yaml"
    file.write_text(
        "name: small\n"
        "datasets:\n"
        "  - {key: known, group: source, path: wds_known, bank: train, resize: 40}\n"
        "  - {key: ours, group: id, path: wds_id}\n"
        "  - {key: few, group: zero-shot, path: wds_few}\n"
        "  - {key: pairs, group: retrieval, path: wds_pairs}\n"
    )
    return file


@pytest.fixture
def run(tmp_path: Path, datasets: Path, make_vit_run: Callable[..., Path]) -> Path:
    names = open_eval_set(datasets / "wds_id").classnames
    assert names is not None
    # Underscores and capitals do not make another class.
    return make_vit_run(tmp_path / "run", tuple(name.capitalize() for name in names))


def test_classifier_for_own_classes_knn_for_the_source(run: Path, table: Path, tmp_path: Path) -> None:
    """Own classes by the classifier and the source set by neighbours."""
    said: list[str] = []
    benchmark = load_benchmark(table)
    found = evaluate_run(run, benchmark, run / "eval", SETTINGS, baselines=tmp_path / "base", say=said.append)
    assert found.results.keys() == {"known", "ours"}
    assert "few: left out, for the model was trained for other classes" in said
    assert "pairs: left out, for the model reads no texts" in said
    assert "untouched model: ours: left out, for the untouched model has no classifier" in said
    summary = found.summary
    assert summary["datasets"]["ours"]["change"] is None
    assert summary["forgetting"] == -summary["datasets"]["known"]["change"]
    assert summary["groups"].keys() == {"id", "source"}
    point = point_of(summary)
    assert point is not None
    assert point.gain == pytest.approx(found.results["ours"]["value"] - 1 / 12), "over what guessing gives"
    assert found.results["ours"]["value"] == pytest.approx(
        timm_accuracy(run, table.parent / "wds_id", tmp_path / "out")
    )
    again = evaluate_run(run, benchmark, run / "eval", SETTINGS, baselines=tmp_path / "base")
    assert sorted(again.skipped) == ["known", "ours"]


def test_a_set_may_lack_classes_and_have_another_order(
    tmp_path: Path, datasets: Path, table: Path, make_vit_run: Callable[..., Path]
) -> None:
    """Photos of every class are not always there to test on: a classifier then chooses among those that are."""
    names = list(open_eval_set(datasets / "wds_id").classnames or ())
    model = load_run(make_vit_run(tmp_path / "more", ("zebra", *reversed(names))))
    row = next(row for row in load_benchmark(table).rows if row.key == "ours")
    subject, dataset = Subject.of(model, SETTINGS), open_dataset(row)
    assert subject.unable(dataset) is None
    images = torch.randn(3, 3, *model.preprocess_cfg["size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        every = subject.encoder.scores(images)
        found = subject.scorer(dataset, Ranks.current())(images)
    assert torch.equal(found, every[:, 1:].flip(1))


def test_the_best_checkpoint_stands_beside_the_last(
    run: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.evaluation.checkpoints, "AT_ONCE", 3)
    benchmark = load_benchmark(table)
    comparison, best = evaluate_checkpoints(run, benchmark, run / "eval", SETTINGS, baselines=tmp_path / "base")
    alone = {
        step: evaluate_run(run, benchmark, tmp_path / str(step), SETTINGS, baselines=tmp_path / "base", step=step)
        for step in (5, 10, 15, 20)
    }
    found = {line["step"]: line["id"] for line in comparison["checkpoints"]}
    assert found == {step: outcome.results["ours"]["value"] for step, outcome in alone.items()}
    assert comparison["best"] == max(found, key=lambda step: (found[step], -step))
    assert comparison["last"] == 20
    assert best.results["known"]["value"] == alone[comparison["best"]].results["known"]["value"]
    assert [line["active_blocks"] for line in comparison["checkpoints"]] == [12, 12, 0, 0]
    assert json.loads((run / "eval" / "checkpoints.json").read_text()) == comparison
    evaluate_command(run, EvalRequest(checkpoints=True, benchmark=table, workers=0, cache="off"))
    said = capsys.readouterr()
    assert said.err.count("(finished before, skipped)") >= 4
    assert f"{100 * found[20]:6.2f}" in said.out
    assert " last" in said.out
    with pytest.raises(ConfigError, match="checkpoints and strength: one at a time"):
        evaluate_command(run, EvalRequest(checkpoints=True, strength=(0.0,), benchmark=table))


def test_the_config_names_rows_of_its_benchmark(
    run: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(run / "config.yaml", [f"eval.benchmark={table}", "eval.datasets=[ours]", "eval.workers=0"])
    (run / "config.yaml").write_text(to_yaml(config))
    evaluate_command(run, EvalRequest(out=tmp_path / "results", cache="off"))
    assert "known" not in capsys.readouterr().out
    evaluate_command(run, EvalRequest(out=tmp_path / "results", datasets=["known"], cache="off"))
    assert "known" in capsys.readouterr().out


def timm_accuracy(run: Path, folder: Path, out: Path) -> float:
    """Of timm's own model with timm's own loading, on images by torchvision's own transforms."""
    import io

    from PIL import Image

    vit = load_run(run)
    assert isinstance(vit, Vit)
    save_timm(vit, out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    cfg = vit.preprocess_cfg
    transform = Compose([Resize((32, 32), InterpolationMode.BICUBIC), ToTensor(), Normalize(cfg["mean"], cfg["std"])])
    data = open_eval_set(folder)
    images = []
    for shard, number in data.places:
        extension = next(ext for ext in ("webp", "png", "jpg") if ext in data.tars[shard].samples[number].members)
        images.append(Image.open(io.BytesIO(data.tars[shard].read(number, extension))).convert("RGB"))
    with torch.no_grad():
        guesses = model(torch.stack([transform(image) for image in images])).argmax(1)
    return float((guesses == torch.tensor(data.labels)).float().mean())


def test_the_strength_curve_keeps_the_classifier(run: Path, table: Path, tmp_path: Path) -> None:
    curve = evaluate_strength(
        run,
        load_benchmark(table),
        tmp_path / "curve",
        SETTINGS,
        baselines=tmp_path / "base",
        alphas=(0.0, 0.5, 1.0),
        datasets=["known", "ours"],
    )
    assert curve["groups"]["1.0"].keys() == {"id", "source"}
    tuned = evaluate_run(run, load_benchmark(table), run / "eval", SETTINGS, baselines=tmp_path / "base")
    assert curve["datasets"]["1.0"]["ours"] == tuned.results["ours"]["value"]
    base = json.loads(next((tmp_path / "base").rglob("known.json")).read_text())
    assert curve["datasets"]["0.0"]["known"] == base["value"]


def test_a_benchmark_without_an_answerable_row_is_refused(run: Path, datasets: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.yaml"
    file.write_text(f"root: {datasets}\ndatasets:\n  - {{key: pairs, group: retrieval, path: wds_pairs}}\n")
    with pytest.raises(
        ConfigError, match=r"benchmark texts: run/step-00000020 cannot be evaluated on any of its rows: .*texts"
    ):
        evaluate_run(run, load_benchmark(file), run / "eval", SETTINGS, baselines=tmp_path / "base")
