"""`seeds` makes several trials of one configuration, and `soup` their mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_by_hand import lay_out

from pipeline.config import ConfigError
from pipeline.runs.results import read_floors, read_summary, reported_at, write_floors
from pipeline.runs.sweep import read_soup, read_state, read_sweep, trial_dir, write_soup, write_state
from pipeline.selection.frontier import floors_of
from pipeline.selection.standings import standings
from pipeline.tuning.layout import renew_soups, write_trial
from pipeline.tuning.progress import describe
from pipeline.tuning.trials import expand

GRID = "grid: {rank: [2, 4]}\nbaselines: [{name: plain, changes: {gate.enabled: false}}]\n"


def test_every_point_and_baseline_has_every_seed(make_config, make_grid) -> None:
    trials = expand(make_config(), make_grid(GRID + "seeds: [0, 5]"))
    assert [one.name for one in trials] == [
        f"{name}_seed{seed}" for name in ("gated_lora_r2_lam1", "gated_lora_r4_lam1", "plain") for seed in (0, 5)
    ]
    assert [one.configuration for one in trials[::2]] == ["gated_lora_r2_lam1", "gated_lora_r4_lam1", "plain"]
    assert [one.config.seed for one in trials] == [0, 5] * 3
    assert trials[1].label == "gated LoRA r2 λ1 seed 5"


def test_a_soup_follows_the_seeds_of_its_configuration(make_config, make_grid) -> None:
    trials = expand(
        make_config("gate.budget=3", "gate.lam=0"), make_grid("grid: {rank: [2]}\nseeds: [0, 1]\nsoup: true")
    )
    *seeds, soup = trials
    assert soup.name == "gated_lora_r2_lam0_soup"
    assert soup.soup_of == tuple(one.name for one in seeds)
    assert (soup.config.adapter.kind, soup.configuration) == ("full", soup.name)
    assert soup.label == "gated LoRA r2 λ0, soup of 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {seed: [0, 1]}\nseeds: [0, 1]", "seeds: grid names seed as well"),
        ("grid: {rank: [2]}\nseeds: [0, 1]\nbaselines: [{changes: {seed: 3}}]", "seeds: baselines names seed as well"),
        ("grid: {rank: [2]}\nseeds: [0, 0]", "seeds: 0 is given twice"),
        ("grid: {rank: [2]}\nseeds: [a]", "seeds: should be whole numbers"),
        ("grid: {rank: [2]}\nsoup: true", "soup: is the mean of several seeds"),
        ("grid: {rank: [2]}\nfloor: 97", "floor: should be a share kept above 0, 1 at most"),
    ],
)
def test_mistakes_are_told_in_a_line(make_grid, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_grid(text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_sweep_of_one_seed_continues_with_three(make_config, make_grid, tmp_path: Path) -> None:
    """The trial that exists keeps its name and its directory, and is the first seed of its configuration."""
    (first,) = lay_out(make_config("seed=7"), make_grid("grid: {rank: [2]}"))
    assert first.name == "gated_lora_r2_lam1"
    more = lay_out(make_config("seed=7"), make_grid("grid: {rank: [2]}\nseeds: [7, 8, 9]\nsoup: true"))
    assert [one.name for one in more] == [
        first.name,
        f"{first.name}_seed8",
        f"{first.name}_seed9",
        f"{first.name}_soup",
    ]
    assert more[0].id == first.id
    entries = read_sweep(tmp_path / "runs" / "sweep")["trials"]
    assert [each["configuration"] for each in entries[:3]] == [first.name] * 3
    soup = read_soup(trial_dir(tmp_path / "runs" / "sweep", more[3].name))
    assert soup is not None and soup.of == [one.name for one in more[:3]]


def test_names_that_look_like_seeds_stay_apart(make_config, make_grid) -> None:
    baselines = "baselines: [{name: flyp_seed1, changes: {kind: full}}, {name: flyp_seed2, changes: {kind: none}}]"
    trials = expand(make_config(), make_grid(f"{baselines}\nseeds: [0, 1]\nsoup: true"))
    soups = [one for one in trials if one.soup_of]
    assert [one.name for one in soups] == ["flyp_seed1_soup", "flyp_seed2_soup"]
    assert [one.configuration for one in trials if not one.soup_of] == ["flyp_seed1"] * 2 + ["flyp_seed2"] * 2
    assert len({one.name for one in trials}) == 6


def test_a_soup_is_made_again_when_another_seed_has_finished(
    make_config, make_grid, tmp_path: Path, write_trial_results: Callable[..., None]
) -> None:
    *seeds, soup = trials = lay_out(make_config(), make_grid("grid: {rank: [2]}\nseeds: [0, 1, 2]\nsoup: true"))
    sweep_dir = tmp_path / "runs" / "sweep"
    for one in (*seeds[:2], soup):
        write_trial_results(trial_dir(sweep_dir, one.name), 0.4)
    write_soup(trial_dir(sweep_dir, soup.name), soup.soup_of, [one.name for one in seeds[:2]])
    renew_soups(sweep_dir, trials)
    assert read_state(trial_dir(sweep_dir, soup.name)).status == "finished"
    write_trial_results(trial_dir(sweep_dir, seeds[2].name), 0.5)
    renew_soups(sweep_dir, trials)
    assert read_state(trial_dir(sweep_dir, soup.name)).status == "waiting"
    assert read_state(trial_dir(sweep_dir, seeds[2].name)).status == "finished"


def test_a_lost_seed_does_not_lose_its_configuration(
    make_config, make_grid, tmp_path: Path, write_trial_results: Callable[..., None]
) -> None:
    trials = lay_out(make_config(), make_grid("grid: {rank: [2, 4]}\nseeds: [0, 1, 2]\nfloor: 0.95"))
    sweep_dir = tmp_path / "runs" / "sweep"
    for trial, id_ in zip(trials, (0.40, 0.41, None, 0.30, 0.31, 0.32), strict=True):
        if id_ is None:
            write_state(trial_dir(sweep_dir, trial.name), status="failed", error="diverged")
        else:
            write_trial_results(trial_dir(sweep_dir, trial.name), id_)
    lines = standings(sweep_dir).splitlines()
    assert lines[0].split("  ")[0] == "configuration"
    assert "id at kept >= 95 %, mean ± 95 % t-interval" in lines[0]
    assert lines[1].startswith("gated_lora_r2_lam1  2 of 3  40.50 ±")
    assert "taken: gated_lora_r2_lam1_seed0" in lines[1]
    assert lines[1].endswith("without gated_lora_r2_lam1_seed2")
    assert lines[2].split()[1:4] == ["3", "of", "3"]


def test_a_floor_that_is_new_is_evaluated_by_finished_trials(make_config, make_grid, tmp_path: Path) -> None:
    """A finished trial waits again for its evaluation alone; with results at the floor it does not."""
    grid = make_grid("grid: {rank: [2]}")
    (trial,) = lay_out(make_config(), grid)
    sweep_dir = tmp_path / "runs" / "sweep"
    run_dir = trial_dir(sweep_dir, trial.name)
    state = write_state(run_dir, status="finished", step=12)
    write_trial(sweep_dir, trial, 12, grid)
    assert json.loads((run_dir / "trial.json").read_text())["status"] == state.status == "finished"
    write_trial(sweep_dir, trial, 12, replace(grid, floor=0.95))
    assert json.loads((run_dir / "trial.json").read_text())["status"] == "waiting"
    for key, status in (("0.9", "waiting"), ("0.95", "finished")):
        write_state(run_dir, status="finished")
        write_floors(run_dir / "eval", {"floor": 0.95, "floors": {key: {"alpha": 1, "id": 0.4, "kept": 0.96}}})
        write_trial(sweep_dir, trial, 12, replace(grid, floor=0.95))
        assert json.loads((run_dir / "trial.json").read_text())["status"] == status


def test_seeds_and_their_soup_are_evaluated_at_the_floor(
    make_config, make_grid, by_hand, tmp_path: Path, known: Path
) -> None:
    """Two seeds and their mean, each with results at the floor; the chosen model is exported at its α."""
    from pipeline.handoff.choice import chosen_run, strength_at_floor

    grid = make_grid("grid: {rank: [2]}\nseeds: [0, 1]\nsoup: true\nfloor: 0.5")
    seeds = lay_out(make_config(f"eval.benchmark={known}"), grid)
    sweep_dir = tmp_path / "runs" / "sweep"
    for trial in seeds:
        by_hand(sweep_dir, trial.name, world=1)
    states = [read_state(trial_dir(sweep_dir, one.name)) for one in seeds]
    assert [one.status for one in states] == ["finished"] * 3, states
    soup = read_soup(trial_dir(sweep_dir, seeds[2].name))
    assert soup is not None and soup.made_of == soup.of == [one.name for one in seeds[:2]]
    for trial in seeds:
        run_dir = trial_dir(sweep_dir, trial.name)
        floors = floors_of(read_floors(run_dir / "eval"))
        assert list(floors) == [0.99, 0.95, 0.9, 0.5]
        at = floors[0.5]
        if at.alpha > 0:
            summary = read_summary(run_dir / reported_at(at.alpha))
            assert (summary["groups"]["id"]["mean"], summary["kept"]["mean"]) == (at.id, at.kept)
        assert '"eval/id_at_95"' in (run_dir / "journal.jsonl").read_text()
    table = describe(sweep_dir, seeds, 0.5)
    assert table.splitlines()[0].split()[-4:] == ["id@99", "id@95", "id@90", "id@50*"]
    run_dir, told = chosen_run(sweep_dir)
    assert f"chosen of 3 trials: {run_dir.name}" in told
    assert strength_at_floor(sweep_dir, run_dir) == floors_of(read_floors(run_dir / "eval"))[0.5].alpha
