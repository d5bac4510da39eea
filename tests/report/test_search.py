"""A sweep under a floor in the report: the model at its strength, seeds with intervals, budget and drift."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from pipeline.files import replace_json
from pipeline.report.by_run import drift, groups, looks, pareto, training
from pipeline.report.directories import collect
from pipeline.report.run import report
from pipeline.report.style import NoData
from pipeline.runs.blocks import describe_blocks
from pipeline.runs.results import reported_at, write_floors
from pipeline.tracking.tracker import open_tracker

MakeRun = Callable[..., Path]
UNTOUCHED = {"clothing": 0.3, "fashion": 0.8}


@pytest.fixture
def search(make_run: MakeRun, tmp_path: Path) -> Path:
    """Two configurations of two seeds, compared at 0.97: the one that learns less at α = 1 reaches more there."""
    directory, entries = tmp_path / "search", list[dict[str, Any]]()
    for name, rank, whole, at_floor in (("wild", 64, 0.60, 0.40), ("mild", 8, 0.50, 0.45)):
        for seed in (0, 1):
            trial, changes = f"{name}_seed{seed}", {"adapter.rank": rank, "seed": seed}
            values = {"clothing": whole, "fashion": 0.7 if name == "mild" else 0.4}
            run = make_run(trial, changes, folder=directory / "trials", values=values, untouched=UNTOUCHED)
            summary = json.loads((run / "eval" / "summary.json").read_text())
            summary["groups"]["id"] |= {"mean": at_floor, "change": at_floor - 0.3}
            summary["datasets"]["clothing"] |= {"value": at_floor, "change": at_floor - 0.3}
            summary["datasets"]["fashion"] |= {"value": 0.776, "change": -0.024}
            replace_json(run / reported_at(0.4) / "summary.json", summary)
            id_ = at_floor + seed / 100
            floors = {f"{floor}": {"alpha": 0.4, "id": id_, "kept": 0.97} for floor in (0.99, 0.97, 0.95, 0.9)}
            write_floors(run / "eval", {"floor": 0.97, "floors": floors})
            replace_json(run / "trial.json", {"status": "finished", "step": 40, "total_steps": 40})
            with open_tracker(run, run_name=trial, enabled=False, owns_status=False) as tracker:
                tracker.metrics(40, {"keep/drift_image": 0.05 if name == "mild" else 0.3, "keep/drift_text": 0.01})
            entry = {"id": f"{len(entries):04d}-0", "name": trial, "label": f"the {trial}", "changes": changes}
            entries.append({**entry, "baseline": False, "configuration": name})
    base = {"adapter.kind": "lora", "gate.enabled": True, "gate.lam": 1.0, "gate.penalty": "l1", "model.name": "m"}
    content = {"name": "search", "base_config": {**base, "seed": 0}, "grid": {}, "trials": entries, "floor": 0.97}
    replace_json(directory / "sweep.json", content)
    return directory


def test_the_model_is_chosen_at_the_floor(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals by hand: s is pooled over both rows, 0.00707, t(0.975, 2) = 4.303; of two seeds ± 2.2 points."""
    monkeypatch.setattr("pipeline.report.run._catalogue", lambda _: ())
    collection = collect(search)
    assert collection.chosen is not None and collection.taken is not None
    assert collection.chosen.name == "mild_seed0"
    assert collection.taken.equal == ()
    page = report(search)
    with (page.parent / "tables" / "floors.csv").open(encoding="utf-8") as file:
        untouched, wild, mild = csv.DictReader(file)
    assert (wild["row"], mild["row"], mild["seeds"]) == ("run", "chosen", "2")
    assert mild["method"].startswith("★")
    assert wild["in-distribution (%) at kept ≥ 97 %"] == "40.5 ± 2.2"
    assert mild["in-distribution (%) at kept ≥ 97 %"] == "45.5 ± 2.2"
    assert untouched["in-distribution (%) at kept ≥ 97 %"] == "30.0"
    html = page.read_text(encoding="utf-8")
    assert "the mild_seed0 at strength 0.4: in-distribution 45.0 % (+15.0 points)" in html
    assert "95 % t-interval of the mean over seeds" in html


def test_after_a_change_of_the_floor_the_sweep_decides(search: Path) -> None:
    """A trial was evaluated at 0.95 before the sweep changed to 0.97, at which it has results as well."""
    run = search / "trials" / "mild_seed0"
    at = {"alpha": 0.4, "id": 0.45, "kept": 0.97}
    write_floors(run / "eval", {"floor": 0.95, "floors": {"0.97": at, "0.95": {**at, "alpha": 1.0}}})
    found = next(one for one in collect(search).runs if one.name == run.name)
    assert found.at_floor is not None
    assert found.at_floor["groups"]["id"]["mean"] == 0.45


def test_drift_is_drawn_against_kept_with_the_limit_it_teaches(search: Path) -> None:
    """No trial keeps 97 % unweakened; at 80 % the mild ones do."""
    collection = collect(search)
    figure = drift(collection, narrow=False)
    assert [line.get_label() for line in figure.axes[0].lines] == [*(run.label for run in collection.runs), "floor"]
    object.__setattr__(collection, "floor", 0.8)
    figure = drift(collection, narrow=False)
    assert "largest drift above the floor: 0.05" in [line.get_label() for line in figure.axes[0].lines]


def test_a_run_has_one_colour_in_all_figures(search: Path) -> None:
    """Few runs have a colour each; of many, those of a method share one."""
    collection = collect(search)
    expected = {run.label: to_hex(looks(collection)[run.name].colour) for run in collection.runs}
    assert len(set(expected.values())) == len(collection.runs) == 4
    drawn = [
        {str(bars.get_label()): to_hex(bars[0].get_facecolor()) for bars in axes.containers}
        | {str(line.get_label()): to_hex(line.get_color()) for line in axes.lines}
        for figure in (groups, pareto, drift)
        for axes in figure(collection, narrow=False).axes
    ]
    assert [{label: colours[label] for label in expected} for colours in drawn] == [expected] * 3
    object.__setattr__(collection, "runs", [*collection.runs, *collection.runs])
    assert {look.label for look in looks(collection).values()} == {"gated LoRA"}
    assert len(set(looks(collection).values())) == 1


def test_drift_is_drawn_over_the_steps(search: Path) -> None:
    titles = [axes.get_title(loc="left") for axes in training(collect(search), narrow=False).axes]
    assert titles == ["loss", "gates closing", "drift, images", "drift, texts"]


def test_two_runs_teach_no_limit_of_drift(search: Path) -> None:
    collection = collect(search)
    object.__setattr__(collection, "runs", collection.runs[:2])
    with pytest.raises(NoData, match="needs 3 runs"):
        drift(collection, narrow=False)


def test_the_budget_is_drawn_and_printed(make_run: MakeRun, tmp_path: Path) -> None:
    kept = ["image.0.fc1", "image.2.q_proj"]
    run = make_run("budget", {"gate.budget": 2, "gate.lam": 0.0}, active=kept)
    gates = json.loads((run / "gate_map.json").read_text())
    usefulness = {target: 2.0 if target in kept else 0.01 for target in gates}
    dropped = {target: 15 for target in gates if target not in kept}
    state = {"step": 40, "gate_map": gates, "adapter": {"kind": "lora", "threshold": 0.1}}
    replace_json(
        run / "checkpoints" / "step-00000040" / "state.json",
        {**state, "budget": {"usefulness": usefulness, "open": kept, "dropped_at": dropped}},
    )
    (run / "checkpoints" / "latest").write_text("step-00000040\n")
    page = report(run)
    svg = (page.parent / "figures" / "budget.svg").read_text(encoding="utf-8")
    assert "How the budget was spent" in svg
    assert "image tower: 2 of 72 kept" in svg and "text tower: 0 of 72 kept" in svg
    lines = describe_blocks(run).splitlines()
    assert lines[0] == f"{run}, step 40: 2 of 144 blocks are active"
    assert next(line for line in lines if line.startswith("fc1")).split() == ["fc1", "#", *["."] * 11]
    table = lines.index("  usefulness  dropped at  block")
    assert lines[table + 1].split() == ["2.000e+00", "active", "image.0.fc1"]
    assert lines[table + 3].split()[1] == "15"
