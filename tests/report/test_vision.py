"""The page of ViTs that were trained as classifiers: one tower, separate target sets, K-NN on the source set."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.evaluation.datasets.benchmark import Benchmark
from pipeline.files import replace_json
from pipeline.report import by_run, by_setting
from pipeline.report.costs import run_costs
from pipeline.report.directories import collect
from pipeline.report.run import report

MakeRun = Callable[..., Path]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_papers_rows_of_its_vits_stand_beside_ours(vision_page: Path) -> None:
    found = rows(vision_page.parent / "tables" / "cifar100-lora.csv")
    assert list(found[0]) == [
        "row", "method", "rank", "λ", "blocks (%)", "seeds", "cifar100", "source set, K-NN imagenet100", "mean"
    ]  # fmt: skip
    shown = [tuple(row.values()) for row in found]
    paper = {before[1:4]: row[1:] for before, row in itertools.pairwise(shown) if row[0] == "paper"}
    assert paper == {
        ("linear classifier", "", ""): ("paper, Table 4", "", "", "", "", "72.07", "87.20", "88.32*"),
        ("full fine-tuning", "", ""): ("paper, Table 4", "", "", "", "", "84.51", "37.34", "60.92"),
        ("LoRA", "16", ""): ("paper, Table 4", "16", "", "100", "", "87.77", "86.24", "87.01"),
        ("LoRA", "128", ""): ("paper, Table 4", "128", "", "100", "", "88.54", "85.06", "86.80"),
        ("gated LoRA, gate.penalty l1", "16", "0.5"):
            ("paper, Table 4", "16", "0.5", "13.89", "", "87.00", "86.56", "86.78"),
        ("gated LoRA, gate.penalty l1", "128", "0.5"):
            ("paper, Table 4", "128", "0.5", "23.61", "", "88.29", "85.86", "87.08"),
        ("gated LoRA, gate.penalty l1", "16", "1"):
            ("paper, Table 4", "16", "1", "6.94", "", "86.61", "86.76", "86.69"),
        ("gated LoRA, gate.penalty l1", "128", "1"):
            ("paper, Table 4", "128", "1", "9.72", "", "87.28", "86.70", "86.99"),
        ("gated LoRA, gate.penalty hinge", "128", "1"):
            ("paper, Table 2", "128", "1", "22.2", "", "88.03", "86.26", "87.14"),
        ("10 random LoRA blocks", "16", ""):
            ("paper, Table 1", "16", "", "22.2*", "", "85.46", "86.04", "85.75"),
    }  # fmt: skip
    assert shown[0] == ("reference", "untouched model", "", "", "", "", "", "87.20", "")
    # two seeds of one configuration: (86.57 + 86.10) / 2, (86.67 + 86.80) / 2
    assert ("run", "gated LoRA, gate.penalty l1", "16", "1", "6.94", "2", "86.33", "86.73", "86.53") in shown
    assert ("run", "10 random LoRA blocks", "16", "", "13.89", "1", "85.00", "86.10", "85.55") in shown
    page = vision_page.read_text()
    assert "paper: Tables 1, 2 and 4 of arXiv 2501.15377" in page
    assert "* Table 4, Linear, mean: 88.32, should be 79.64" in page
    assert "* Table 1, Ours 22.2, blocks: 22.2, should be 13.9 (10 of 72)" in page


def test_a_page_of_vits_has_all_figures(vision_page: Path) -> None:
    """A page of ViTs has all figures with the measures that they show."""
    figures = {path.stem for path in (vision_page.parent / "figures").glob("*.svg")}
    assert figures == {"pareto", "rank", "lambda", "active", "cost", "map", "training"}
    page = vision_page.read_text()
    assert "text tower" not in page and "contrastive" not in page and "one text" not in page
    collection = collect(vision_page.parent.parent)
    (axes,) = by_run.pareto(collection, narrow=False).axes
    assert axes.get_xlabel() == "knowledge kept (% of the untouched model, K-NN on its source set)"
    assert axes.get_ylabel() == "classifier accuracy (%)"
    assert "linear classifier" in axes.get_legend_handles_labels()[1]
    own, source = by_setting.by_rank(collection, narrow=False).axes
    assert [own.get_ylabel(), source.get_ylabel()] == ["classifier accuracy (%)", "K-NN accuracy (%)"]
    lines = [set(one.get_legend_handles_labels()[1]) for one in (own, source)]
    assert {"full fine-tuning", "linear classifier"} < lines[0] & lines[1]
    assert "untouched model" in lines[1] - lines[0]
    assert "points over guessing), kept " in page


def test_the_cost_of_a_vit_is_that_of_its_one_tower(vision_page: Path) -> None:
    """4.6 GMAC are timm's own count of ViT-S/16; a block of rank r on (in, out) adds r (in + out) at 197 tokens."""
    costs = run_costs(collect(vision_page.parent.parent))
    assert costs["r16_l1"].merged == pytest.approx(4.6, abs=0.02)
    every_site = 12 * 16 * (4 * 2 * 384 + 2 * 5 * 384) * 197
    assert costs["lora_r16"].unmerged - costs["lora_r16"].merged == pytest.approx(every_site / 1e9)


def test_two_target_sets_are_never_compared(make_vit: MakeRun, vision: Benchmark, tmp_path: Path) -> None:
    for target, level in (("cifar100", 0.0), ("cifar10", 0.1)):
        for rank, kept in ((4, 0.87), (16, 0.86)):
            changes = {"adapter.rank": rank, "data.train": f"shards/{target}"}
            make_vit(f"{target}_r{rank}", changes, 0.8 + level + rank / 1000, kept, 4, target=target)
    page = report(tmp_path / "runs")
    figures = {path.stem for path in (page.parent / "figures").glob("*.svg")}
    assert {"pareto-cifar100", "pareto-cifar10", "rank-cifar100", "rank-cifar10"} < figures
    assert {path.stem for path in (page.parent / "tables").glob("*.csv")} == {"runs", "cifar100-lora", "cifar10-lora"}
    assert len([row for row in rows(page.parent / "tables" / "runs.csv") if row["row"] == "chosen"]) == 2
    assert len([row for row in rows(page.parent / "tables" / "cifar10-lora.csv") if row["row"] == "chosen"]) == 1
    assert "chosen, cifar10" in page.read_text() and "cifar100: Learned against kept" in page.read_text()


def test_the_best_checkpoint_stands_beside_the_last(make_vit: MakeRun, tmp_path: Path) -> None:
    run = make_vit("r16", {"adapter.rank": 16, "gate.lam": 1.0}, 0.86, 0.868, 5)
    make_vit("plain", {"adapter.rank": 16, "gate.enabled": False}, 0.87, 0.85)
    best = make_vit("elsewhere", {"adapter.rank": 16, "gate.lam": 1.0}, 0.88, 0.86, 9)
    (run / "eval" / "checkpoints").mkdir()
    (best / "eval").rename(run / "eval" / "checkpoints" / "20")
    for file in sorted(best.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    best.rmdir()
    lines = [
        {"step": 20, "id": 0.88, "active_blocks": 9, "blocks": 72},
        {"step": 40, "id": 0.86, "active_blocks": 5, "blocks": 72},
    ]
    comparison = {"benchmark": "vision", "checkpoints": lines, "best": 20, "last": 40}
    (run / "eval" / "checkpoints.json").write_text(json.dumps(comparison))
    page = report(tmp_path / "runs")
    overview = {row["run"].removeprefix("★ "): row for row in rows(page.parent / "tables" / "runs.csv")}
    assert overview["r16"]["best and last checkpoint (%)"] == "88.00 at step 20, 86.00 at 40"
    assert overview["plain"]["best and last checkpoint (%)"] == ""
    shown = [tuple(row.values())[1:] for row in rows(page.parent / "tables" / "cifar100-lora.csv")]
    assert shown[-3:] == [
        ("gated LoRA", "16", "1", "6.94", "1", "86.00", "86.80", "86.40"),
        ("best checkpoint, step 20", "16", "1", "12.50", "1", "88.00", "86.00", "87.00"),
        ("paper, Table 4", "16", "1", "6.94", "", "86.61", "86.76", "86.69"),
    ]
    # A model of random blocks has as many at each checkpoint, of all that there could be.
    random = make_vit("random", {"adapter.rank": 16, "adapter.random_k": 5}, 0.85, 0.86)
    shutil.copytree(random / "eval", random / "eval" / "checkpoints" / "20")
    replace_json(random / "eval" / "checkpoints.json", comparison)
    report(tmp_path / "runs")
    blocks = [row["blocks (%)"] for row in rows(page.parent / "tables" / "cifar100-lora.csv")]
    assert blocks[-3:] == ["6.94", "6.94", "6.94"]
    # Where no other was evaluated, the best one's results are the run's.
    for name in ("summary", "cifar100", "imagenet100"):
        (run / "eval" / f"{name}.json").unlink()
    alone = next(each for each in collect(tmp_path / "runs").runs if each.name == "r16")
    assert alone.best_alone and alone.status == "finished" and alone.group("id") == 0.88
    report(tmp_path / "runs")
    shown = [tuple(row.values())[1:] for row in rows(page.parent / "tables" / "cifar100-lora.csv")]
    assert ("gated LoRA, best checkpoint, step 20", "88.00") in {(row[0], row[5]) for row in shown}


def test_another_model_gets_no_published_numbers(make_vit: MakeRun, tmp_path: Path) -> None:
    make_vit("small", {"model.name": "timm:vit_small_patch16_224.augreg_in21k", "adapter.rank": 16}, 0.8, 0.8, 3)
    page = report(tmp_path / "runs")
    assert {row["row"] for row in rows(page.parent / "tables" / "cifar100-lora.csv")} == {"reference", "run"}
