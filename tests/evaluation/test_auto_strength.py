"""A strength is chosen on some images and reported on others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Promote
from pipeline.data.eval.wds_layout import open_eval_set
from pipeline.evaluation.auto_strength import evaluate_auto, evaluate_floors
from pipeline.evaluation.command import EvalRequest, evaluate_command
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings, open_dataset
from pipeline.evaluation.datasets.parts import CHOOSING_MOST, of_part
from pipeline.runs.results import read_floors
from pipeline.selection.floor import Floor
from pipeline.selection.frontier import FLOORS, floors_of

SETTINGS = Settings(batch_size=16, workers=0)
OTHERS = ("moved", "few", "pairs")


def test_the_parts_make_the_whole_and_depend_on_names_alone() -> None:
    names = [f"0.tar/s{i:07d}" for i in range(57)]
    choosing, reporting = of_part("choosing", "pets", names), of_part("reporting", "pets", names)
    assert len(choosing) == 11
    assert sorted([*choosing, *reporting]) == list(range(57)) == of_part("all", "pets", names)
    assert choosing == sorted(choosing) and reporting == sorted(reporting)
    # the same images in another order, and what it was when the rule was written
    back = of_part("choosing", "pets", names[::-1])
    assert {names[::-1][i] for i in back} == {names[i] for i in choosing}
    assert choosing != of_part("choosing", "cars", names)
    assert len(of_part("choosing", "large", [str(i) for i in range(20_000)])) == CHOOSING_MOST
    with pytest.raises(ConfigError, match="1 image is too few"):
        of_part("reporting", "one", ["a"])


def test_a_part_is_drawn_from_the_sample_of_a_row(benchmark_file: Path) -> None:
    row = next(row for row in load_benchmark(benchmark_file).rows if row.key == "ours").model_copy(
        update={"sample": 20}
    )
    whole = open_dataset(row)
    choosing, reporting = (open_dataset(row.model_copy(update={"part": part})) for part in ("choosing", "reporting"))
    assert whole.chosen is not None and choosing.chosen is not None and reporting.chosen is not None
    assert sorted([*choosing.chosen, *reporting.chosen]) == list(whole.chosen)
    assert len({each.digest for each in (whole, choosing, reporting)}) == 3


@pytest.fixture
def run(tmp_path: Path, make_run: Callable[..., Path], trained_clip_dir: Path) -> Path:
    """A run whose untouched model knows something that it can lose."""
    return make_run(tmp_path / "run", model=trained_clip_dir)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_auto_reports_on_images_that_it_did_not_choose_on(
    tmp_path: Path, make_run: Callable[..., Path], benchmark_file: Path, trained_clip_dir: Path, kind: str
) -> None:
    run, table = make_run(tmp_path / "run", kind=kind, model=trained_clip_dir), load_benchmark(benchmark_file)
    floor = Floor.of(Promote(min_kept=0.5))
    chosen, outcome = evaluate_auto(run, table, run / "eval", SETTINGS, floor, baselines=tmp_path / "baselines")
    assert outcome is not None and 0 < chosen.alpha <= 1
    assert chosen.margins[chosen.alpha] >= 0
    folder = run / "eval" / "strength" / "auto"
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(json.dumps(outcome.summary)).items() <= summary.items()
    assert summary["strength"]["alpha"] == chosen.alpha
    assert summary["strength"]["floor"] == "promote.min_kept >= 0.5"
    assert len(summary["strength"]["choosing_digest"]) == 64
    on = json.loads((folder / "choosing" / f"{chosen.alpha:g}" / "summary.json").read_text())
    assert on["datasets"].keys() == set(OTHERS), "the own data have no say in what is kept"
    assert on["kept"]["mean"] - 0.5 == pytest.approx(chosen.margins[chosen.alpha])
    assert on["model_digest"] == summary["model_digest"]
    for key in OTHERS:
        whole = len(open_eval_set(next(row.path for row in table.rows if row.key == key)))
        assert on["datasets"][key]["n"] + summary["datasets"][key]["n"] == whole
        assert summary["datasets"][key]["change"] is not None


def test_what_is_there_is_not_evaluated_again(run: Path, tmp_path: Path, benchmark_file: Path) -> None:
    table, said = load_benchmark(benchmark_file), []
    floor, place = Floor.of(Promote(min_kept=0.5)), {"baselines": tmp_path / "baselines", "say": said.append}
    first, _ = evaluate_auto(run, table, run / "eval", SETTINGS, floor, **place)
    said.clear()
    again, _ = evaluate_auto(run, table, run / "eval", SETTINGS, floor, **place)
    assert again == first
    assert said and all("skipped" in line for line in said)


def test_a_floor_of_many_digits_is_found_again(run: Path, tmp_path: Path, benchmark_file: Path) -> None:
    table, floor = load_benchmark(benchmark_file), 0.5000001
    written = evaluate_floors(run, table, SETTINGS, floor, baselines=tmp_path / "baselines")
    found = floors_of(read_floors(run / "eval"))
    assert list(found) == [*FLOORS, floor]
    assert found[floor].alpha == written["floors"]["0.5000001"]["alpha"]


def test_the_command_takes_one_strength_for_a_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_command(run, EvalRequest(strength=(0.5,))) == 0
    assert json.loads((run / "eval" / "strength" / "0.5" / "summary.json").read_text())["strength"] == {"alpha": 0.5}
    assert evaluate_command(run, EvalRequest(strength=("auto",), floor=0.5)) == 0
    printed = capsys.readouterr().out
    assert "keeps promote.min_kept >= 0.5, chosen on separate images" in printed
    assert '"eval/strength/auto/summary.json"' in (run / "journal.jsonl").read_text()


def test_mistakes_with_auto_are_told_in_a_line(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"none is set: give promote\.min_kept .* or promote\.max_forgetting"):
        evaluate_command(run, EvalRequest(strength=("auto",)))
    with pytest.raises(ConfigError, match="no dataset of a group other than id"):
        evaluate_command(run, EvalRequest(strength=("auto",), floor=0.5, datasets=["ours"]))
    with pytest.raises(ConfigError, match="auto is a single strength"):
        evaluate_command(run, EvalRequest(strength=("auto", 0.5), floor=0.5))
    with pytest.raises(ConfigError, match="above 0"):
        evaluate_command(run, EvalRequest(strength=(0.0,)))


def test_a_floor_that_nothing_keeps_names_the_untouched_model(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.auto_strength.strongest", lambda margin, untouched: (0.0, {1.0: -0.2}))
    assert evaluate_command(run, EvalRequest(strength=("auto",), floor=1.0)) == 1
    printed = capsys.readouterr().out
    assert "α = 0, the untouched model: no strength above 0 keeps promote.min_kept >= 1" in printed
