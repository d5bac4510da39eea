"""The chosen trial of a sweep, on given results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Promote
from pipeline.handoff.choice import chosen_run, rule_of, strength_at_floor
from pipeline.runs.results import reported_at, write_floors


@pytest.fixture
def sweep(tmp_path: Path, write_sweep_of: Callable[..., None]) -> Path:
    """Three trials whose rule allows to forget 0.1: one learned and forgot most, one less, one has no results."""
    write_sweep_of(tmp_path, "wild", "mild", "late")
    for name, gain, drop in (("wild", 0.4, 0.2), ("mild", 0.2, 0.05), ("late", None, None)):
        folder = tmp_path / "trials" / name
        (folder / "eval").mkdir(parents=True)
        (folder / "config.yaml").write_text("name: x\ndata: {train: shards}\npromote: {max_forgetting: 0.1}\n")
        if gain is None or drop is None:
            continue
        groups = {
            "id": {"mean": 0.5 + gain, "change": gain, "missing": []},
            "shift": {"mean": 0.8 - drop, "change": -drop, "missing": []},
        }
        datasets = {name: {"group": name, "value": each["mean"]} | each for name, each in groups.items()}
        summary = {"groups": groups, "forgetting": drop, "datasets": datasets}
        (folder / "eval" / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_a_trial_that_keeps_the_rule_is_preferred(sweep: Path) -> None:
    """A trial that keeps its rule is taken before a better one that does not."""
    run_dir, message = chosen_run(sweep)
    assert run_dir.name == "mild"
    assert message.startswith("chosen of 2 trials: mild")
    assert message.endswith("the promotion rule holds for 1 of them; 1 without results")


def test_another_rule_takes_another_trial(sweep: Path) -> None:
    assert chosen_run(sweep, Promote(max_forgetting=0.3))[0].name == "wild"
    assert chosen_run(sweep, rule_of(sweep, ["max_forgetting=0.3"]))[0].name == "wild"


def test_where_the_rule_holds_for_none_the_best_of_all_is_shown(sweep: Path) -> None:
    run_dir, message = chosen_run(sweep, Promote(min_gain=0.9))
    assert run_dir.name == "wild"
    assert "holds for none of them" in message


def test_a_sweep_file_that_cannot_be_read_is_reported(sweep: Path) -> None:
    (sweep / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        chosen_run(sweep)


@pytest.fixture
def at_floor(sweep: Path, write_sweep_of: Callable[..., None]) -> Callable[..., None]:
    """write(wild=(0.2, 0.9), mild=(0.0, 0.5)): (strength, id) of each trial at the floor of the sweep."""

    def write(**trials: tuple[float, float]) -> None:
        write_sweep_of(sweep, *trials, floor=0.97)
        for name, (alpha, id_) in trials.items():
            run_dir = sweep / "trials" / name
            entry = {"alpha": alpha, "id": id_, "kept": 0.98}
            write_floors(run_dir / "eval", {"floor": 0.97, "floors": {"0.97": entry}})
            shutil.copytree(run_dir / "eval", run_dir / reported_at(alpha))

    return write


def test_a_rule_that_excludes_what_keeps_the_floor_is_named(sweep: Path, at_floor: Callable[..., None]) -> None:
    at_floor(wild=(0.2, 0.4), mild=(0.0, 0.5))
    rule = Promote(min_gain=0.45)
    run_dir, _ = chosen_run(sweep, rule)
    with pytest.raises(ConfigError) as caught:
        strength_at_floor(sweep, run_dir, rule)
    text = str(caught.value)
    assert "the chosen trial mild keeps 0.97 at strength 0 alone" in text
    assert "the promotion rule (promote.min_gain=0.45) holds for 0 of 1 trials that keep it at a strength above" in text
    assert strength_at_floor(sweep, chosen_run(sweep, Promote())[0], Promote()) == 0.2


def test_a_floor_that_no_trial_keeps_is_named(sweep: Path, at_floor: Callable[..., None]) -> None:
    at_floor(wild=(0.0, 0.4), mild=(0.0, 0.5))
    with pytest.raises(ConfigError, match=r"no trial keeps 0\.97 at any strength above 0.* lower the floor"):
        strength_at_floor(sweep, chosen_run(sweep)[0])
