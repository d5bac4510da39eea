"""The page, its tables and figures, from runs, sweeps and directories of runs."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import struct
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.report.by_run import strength
from pipeline.report.directories import collect
from pipeline.report.run import report
from pipeline.report.stored import collect as collect_experiment
from pipeline.report.tables import state, tables

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """What a browser would load and what it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [str(found[name]) for name in ("src", "href", "xlink:href") if found.get(name)]
        self.ids += [str(found["id"])] if "id" in found else []
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        self.text += " " + data


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a report; a test of its tables does without."""
    monkeypatch.setattr("pipeline.report.run._catalogue", lambda _: ())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_sweep_that_still_runs_gives_a_whole_page(sweep_dir: Path, sweep_page: Path) -> None:
    assert sweep_page == sweep_dir / "report" / "report.html"
    page = Page(sweep_page)
    # what is missing is said
    assert "Not complete yet." in page.text and "the later: waiting" in page.text
    assert "the busy: training 20/40" in page.text
    assert "the broken: failed at step 10/40: step 12: the loss is not finite" in page.text
    # it loads nothing, and no id stands twice
    assert all(link.startswith("#") for link in page.loads)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", page.html)
    assert len(page.ids) == len(set(page.ids))
    for link in page.loads:
        assert link.removeprefix("#") in page.ids
    figures = {path.stem for path in (sweep_dir / "report" / "figures").glob("*.svg")}
    assert figures == {"pareto", "rank", "lambda", "active", "cost", "map", "training"}
    assert "Strength curve: no run was evaluated at several strengths." in page.text
    for name in figures:
        png = (sweep_dir / "report" / "figures" / f"{name}.png").read_bytes()
        assert struct.unpack(">II", png[16:24]) > (800, 300)


def test_every_drawing_takes_the_colours_of_the_page(sweep_page: Path) -> None:
    html = sweep_page.read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 14
    for drawing in drawings:
        # White and black of matplotlib would vanish on one kind of page.
        assert not re.search(r"(fill|stroke): ?#(000000|ffffff|1d2026|fefefe)", drawing)
        assert "var(--ink)" in drawing and "var(--c" in drawing
    for variable in set(re.findall(r"var\((--[a-z0-9]+)\)", html)):
        assert html.count(f"{variable}: #") == 2, f"{variable} needs a light and a dark colour"


def test_the_tables_have_the_layout_of_the_papers(sweep_page: Path) -> None:
    tables = sweep_page.parent / "tables"
    assert {path.stem for path in tables.iterdir()} == {"runs"} | {
        f"{group}-{kind}" for group in ("shift", "zero-shot", "retrieval") for kind in ("lora", "dora")
    }
    lora = rows(tables / "zero-shot-lora.csv")
    assert [row["method"] for row in lora] == [
        "untouched model", "full fine-tuning", "LoRA", "LoRA", *["gated LoRA"] * 4
    ]  # fmt: skip
    untouched = lora[0]
    # stl10 stands apart; the inner mean has the other two; id weighs one half in the outer one
    assert untouched["zero-shot stl10†"] == "90.0"
    assert untouched["zero-shot mean"] == "34.0" and untouched["both"] == "33.0"
    gated = {(row["rank"], row["λ"]): row for row in lora if row["method"] == "gated LoRA"}
    assert gated["8", "0.3"]["blocks (%)"] == "8.33" and gated["64", "1"]["blocks (%)"] == "2.78"
    # two seeds of one configuration are one row: 46 + 0.125 - 5 and 46 - 2
    assert gated["8", "1"]["seeds"] == "2" and gated["8", "1"]["clothing"] == "42.6"
    retrieval = rows(tables / "retrieval-dora.csv")
    assert retrieval[0]["emoji_names IR@1"] == "9.0" and retrieval[-1]["emoji_names TR@5"] == "5.0"


@pytest.mark.usefixtures("without_figures")
def test_a_group_stands_in_the_page_where_it_was_evaluated(make_run: MakeRun, sweep_page: Path, tmp_path: Path) -> None:
    """The set that the model was pretrained on, for which the demo's benchmark has no row; and no group but that."""
    (tmp_path / "vision.yaml").write_text(
        "datasets:\n  - {key: cifar100, group: id, path: a}\n  - {key: imagenet100, group: source, path: b}\n"
    )
    table = load_benchmark(tmp_path / "vision.yaml")
    before = {"cifar100": 0.3, "imagenet100": 0.87}
    for rank, known in ((4, 0.85), (8, 0.81)):
        values = {"cifar100": 0.8, "imagenet100": known}
        make_run(f"r{rank}", {"adapter.rank": rank}, table=table, values=values, untouched=before)
    page = report(tmp_path / "runs")
    groups = ["mean of the group (%) in-distribution", "mean of the group (%) source set"]
    first, second, third = rows(page.parent / "tables" / "runs.csv")
    assert [name for name in first if "group" in name] == groups
    assert [[row[name] for name in groups] for row in (first, second, third)] == [
        ["30.0", "87.0"], ["80.0", "85.0"], ["80.0", "81.0"]
    ]  # fmt: skip
    assert [row["forgetting (points)"] for row in (second, third)] == ["2.00", "6.00"]
    shown = rows(page.parent / "tables" / "source-lora.csv")
    assert [row["source set, K-NN imagenet100"] for row in shown] == ["87.00", "85.00", "81.00"]
    assert "source set" in Page(page).text
    assert "source set" not in sweep_page.read_text()


def test_the_chosen_model_is_marked_and_named(sweep_page: Path) -> None:
    overview = rows(sweep_page.parent / "tables" / "runs.csv")
    chosen = [row["run"] for row in overview if row["row"] == "chosen"]
    assert chosen == ["★ r64_l0.3"]
    assert "the r64_l0.3: in-distribution 45.5 % (+13.5 points), kept " in Page(sweep_page).text
    states = {row["run"]: row["state"] for row in overview}
    assert states["later"] == "waiting" and states["busy"] == "training 20/40"


def test_a_run_without_any_result_still_has_a_page(make_run: MakeRun) -> None:
    page = report(make_run("bare", steps=0, status=None))
    assert [path.stem for path in (page.parent / "tables").iterdir()] == ["runs"]
    assert "no run has recorded a loss yet" in Page(page).text


def test_a_killed_run_is_not_called_training(make_run: MakeRun) -> None:
    run = make_run("killed", steps=20)
    journal = run / "journal.jsonl"
    journal.write_text("".join(line for line in journal.open() if '"status"' not in line or "RUNNING" in line))
    assert state(collect(run).runs[0]) == "stopped at step 20/40"


def test_the_strength_curve_is_drawn_where_it_was_measured(make_run: MakeRun) -> None:
    run = make_run("one", values={"clothing": 0.5, "fashion": 0.7})
    groups = {str(alpha): {"id": 0.3 + 0.2 * alpha, "shift": 0.8 - 0.1 * alpha} for alpha in (0.0, 0.5, 1.0)}
    (run / "eval" / "strength.json").write_text(json.dumps({"alphas": [0.0, 0.5, 1.0], "groups": groups}))
    (axes,) = strength(collect(run), narrow=True).axes
    (line,) = axes.get_lines()
    assert line.get_xydata() == pytest.approx(np.array([[30, 80], [40, 75], [50, 70]]))
    assert [text.get_text() for text in axes.texts] == ["α 0", "α 1"]


def test_a_new_report_replaces_an_old_one_in_its_place(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a", {"adapter.kind": "full"}, values={"clothing": 0.4, "fashion": 0.7})
    one = make_run("b", values={"clothing": 0.5, "fashion": 0.6}, active=["image.11.fc1"])
    out = tmp_path / "page"
    assert report(one, out) == out / "report.html"
    # a single run shows its gates over time, and nothing of groups that its benchmark has not got
    assert {path.stem for path in (out / "figures").glob("*.svg")} == {"groups", "pareto", "map", "training", "scores"}
    assert "fashion" in Page(out / "report.html").text and "Zero-shot" not in Page(out / "report.html").text
    report(tmp_path / "runs" / "a", out)
    assert {path.stem for path in (out / "figures").glob("*.png")} == {"groups", "pareto", "training"}
    assert not list(out.rglob("*.partial"))


def paper_table(runs: Path, key: str) -> list[dict[str, str]]:
    found = next(table for table in tables(collect(runs)) if table.key == key)
    return list(csv.DictReader(io.StringIO(found.csv())))


def test_the_papers_numbers_need_the_papers_configuration(make_run: MakeRun, tmp_path: Path) -> None:
    """The paper's numbers are next to ours only where the configuration is the paper's."""
    paper = load_benchmark("paper", root=tmp_path)
    values = {row.key: 0.5 for row in paper.rows}
    common = {"values": values, "untouched": values, "table": paper, "steps": 0}
    model = {"model.name": "ViT-B-16-quickgelu", "model.pretrained": "openai"}
    make_run("ours", {**model, "adapter.rank": 4, "gate.lam": 1.0}, **common)
    make_run("other_lambda", {**model, "adapter.rank": 4, "gate.lam": 0.5}, **common)
    make_run("other_rank", {**model, "adapter.rank": 5, "gate.lam": 1.0}, **common)
    make_run("other_weights", {"adapter.rank": 8, "gate.lam": 1.0}, **common)
    make_run("flyp", {**model, "adapter.kind": "full"}, **common)
    found = paper_table(tmp_path / "runs", "retrieval-lora")
    beside = {before["method"]: row for before, row in itertools.pairwise(found) if row["row"] == "paper"}
    assert sum(row["row"] == "paper" for row in found) == len(beside) == 3
    full = next(row for name, row in beside.items() if name.startswith("full"))
    ours = next(row for name, row in beside.items() if name.startswith("gated LoRA"))
    assert full["imagenet"] == "82.5" and beside["untouched model"]["mscoco IR@1"] == "51.7"
    assert ours["mscoco IR@1"] == "50.2" and ours["blocks (%)"] == "2.08"
    # a number that the paper got wrong is marked, and the note says what it should be
    assert ours["flickr30k IR@5"] == "80.0*"
    notes = next(table for table in tables(collect(tmp_path / "runs")) if table.key == "retrieval-lora").notes
    assert any(note.startswith("* Table 14, Ours 4, Flickr30k IR@5: 80.0") for note in notes)
    shift, zero_shot = (paper_table(tmp_path / "runs", f"{group}-lora") for group in ("shift", "zero-shot"))
    assert [row["distribution shift imagenet-a"] for row in shift if row["row"] == "paper"] == [
        "50.00",
        "48.29",
        "51.07",
    ]
    assert [row["zero-shot mean"] for row in zero_shot if row["row"] == "paper"] == ["66.8", "52.8", "66.5"]


def test_another_benchmark_gets_no_published_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    model = {"model.name": "ViT-B-16-quickgelu", "model.pretrained": "openai"}
    make_run("ours", {**model, "adapter.rank": 4}, values={"clothing": 0.4, "fashion": 0.7})
    assert all(row["row"] != "paper" for row in paper_table(tmp_path / "runs", "shift-lora"))


def test_what_is_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run .* nor a sweep"):
        report(tmp_path)
    (tmp_path / "sweep.json").write_text('{"trials": 1}')
    with pytest.raises(ConfigError, match=r"sweep\.json: is not a selora-sweep file, it has no name, base_config"):
        report(tmp_path)
    with pytest.raises(ConfigError, match="uri: only an experiment"):
        report(tmp_path, uri="http://localhost:1")


@pytest.mark.slow
def test_an_experiment_gives_the_report_of_its_directories(make_run: MakeRun, tmp_path: Path) -> None:
    """An experiment on MLflow gives the report of its directories."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values = {"clothing": 0.5, "fashion": 0.6, "emoji_names": 0.05}
    make_run("gated", {"adapter.rank": 8, "gate.lam": 0.3}, values=values, active=["image.11.fc1"], uri=uri)
    make_run("plain", {"adapter.rank": 8, "gate.enabled": False}, values=values, uri=uri)
    make_run("cut", {"adapter.rank": 16}, steps=20, status="KILLED", uri=uri)
    stored, local = collect_experiment("report", uri), collect(tmp_path / "runs")
    there, here = ({run.name: run for run in one.runs} for one in (stored, local))
    assert there.keys() == here.keys()
    for name, run in there.items():
        assert run.settings == here[name].settings and run.status == here[name].status
        assert run.gates == (here[name].gates or run.gates) and run.step == here[name].step
        assert run.summary == here[name].summary and run.metrics == here[name].metrics
        assert run.history["train/loss"] == here[name].history["train/loss"]
    # the killed run has no file of its gates, only their last scores
    assert there["cut"].status == "stopped" and len(there["cut"].gates) == 144 and there["cut"].active_share == 1
    page = report("mlflow:report", tmp_path / "page", uri)
    assert "MLflow experiment report" in Page(page).text and "gated LoRA" in Page(page).text
    with pytest.raises(ConfigError, match=r"no experiment 'other'; there are: .*report"):
        report("mlflow:other", uri=uri)
    with pytest.raises(ConfigError, match="there is no such file"):
        report("mlflow:report", uri=f"sqlite:///{tmp_path / 'none.db'}")


@pytest.mark.usefixtures("without_figures")
def test_methods_are_compared_at_what_they_keep(make_run: MakeRun, tmp_path: Path) -> None:
    """Two seeds with a curve of two straight pieces each, and a run without a curve; t(0.975, 1) = 12.71."""
    before = {"clothing": 0.3, "fashion": 0.8}
    for seed, best in ((0, 0.5), (1, 0.6)):
        run = make_run(f"seed{seed}", {"seed": seed}, values={"clothing": best, "fashion": 0.72}, untouched=before)
        ends = {"0.0": before, "1.0": {"clothing": best, "fashion": 0.72}}
        groups = {alpha: {"id": each["clothing"], "shift": each["fashion"]} for alpha, each in ends.items()}
        (run / "eval" / "strength.json").write_text(json.dumps({"groups": groups, "datasets": ends}))
    make_run("plain", {"gate.enabled": False}, values={"clothing": 0.4, "fashion": 0.8}, untouched=before)
    page = report(tmp_path / "runs")
    untouched, gated = rows(page.parent / "tables" / "floors.csv")
    shown = [f"in-distribution (%) at kept ≥ {share} %" for share in (99, 95, 90)]
    assert [untouched[name] for name in shown] == ["30.0"] * 3
    assert [gated[name] for name in shown] == ["32.5 ± 6.4", "42.5 ± 31.8", "55.0 ± 63.5"]
    assert gated["seeds"] == "2"
    assert "95 % t-interval of the mean over seeds" in Page(page).text
