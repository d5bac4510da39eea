"""A sampler proposes configurations; earlier ones are in the trials' directories."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from sweep_by_hand import lay_out

from pipeline.config import ConfigError
from pipeline.runs.sweep import read_sweep, trial_dir, write_state
from pipeline.tuning.layout import Proposals
from pipeline.tuning.mlflow_runs import SweepRuns
from pipeline.tuning.search import Range, Search, Tried, propose
from pipeline.tuning.sweep import plan_sweep, sweep

RANGES = "ranges: {train.lr: {log: [1e-5, 1e-2]}, rank: {choices: [2, 4, 8]}, train.steps: {integers: [5, 9]}}\n"
GRID = "grid: {rank: [2], train.steps: [7]}\nsearch: {trials: 4}\nfloor: 0.95\n" + RANGES
SPACE = {"lr": Range("log", (1e-5, 1e-1)), "k": Range("choices", ("a", [1, 2], None)), "n": Range("integers", (1, 9))}


def reached(point: dict) -> float:
    """Best at lr = 1e-3, k = [1, 2], n = 5."""
    return -abs(math.log10(point["lr"]) + 3) - (point["k"] != [1, 2]) - abs(point["n"] - 5) / 10


def best_of(sampler: str, seed: int, trials: int = 30) -> float:
    tried: list[Tried] = []
    search = Search(trials=trials, sampler=sampler)  # pyright: ignore[reportArgumentType]
    for number in range(trials):
        point = propose(SPACE, tried, search, 1000 * seed + number)
        assert all(SPACE[key].holds(value) for key, value in point.items())
        tried.append(Tried(point, reached(point), True))
    return max(each.value for each in tried if each.value is not None)


def test_the_sampler_finds_more_than_chance_does() -> None:
    """The mean of three searches of thirty."""
    tpe, chance = (sum(best_of(sampler, seed) for seed in range(3)) / 3 for sampler in ("tpe", "random"))
    assert tpe > chance


def test_a_proposal_follows_from_what_was_tried_alone() -> None:
    """Failed and unfinished trials take part and poison nothing."""
    search = Search(trials=8)
    points = [{"lr": 10.0**-i, "k": None, "n": i} for i in range(2, 6)]
    tried = [Tried(point, reached(point), True) for point in points[:2]]
    tried += [Tried(points[2], None, True), Tried(points[3], None, False)]
    assert propose(SPACE, tried, search, 3) == propose(SPACE, list(tried), search, 3)
    lrs = [propose(SPACE, tried, search, seed)["lr"] for seed in range(20)]
    assert all(f"{lr:.3g}" == f"{lr:g}" for lr in lrs)
    assert len(set(lrs)) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search: {trials: 4}\nfloor: 0.9\ngrid: {rank: [2]}", "search: needs ranges"),
        ("ranges: {rank: {integers: [2, 4]}}\ngrid: {rank: [2]}", "ranges: need search"),
        (GRID.replace("floor: 0.95\n", ""), "search: needs a floor"),
        (GRID.replace("[1e-5, 1e-2]", "[1e-2, 1e-5]"), "ranges.train.lr: log: is empty, 0.01 is not below 1e-05"),
        (GRID.replace("[1e-5, 1e-2]", "[0, 1e-2]"), "ranges.train.lr: log: needs a low end above 0"),
        (GRID.replace("[5, 9]", "[5.5, 9]"), "ranges.train.steps: integers: needs two whole numbers"),
        (GRID.replace("[2, 4, 8]", "[2]"), "ranges.rank: choices: needs two different values"),
        (GRID.replace("choices", "chioces"), "ranges.rank: should be .* one of linear, log, integers, choices"),
        (
            GRID.replace("grid: {rank: [2]", "grid: {rank: [3]"),
            r"grid.adapter.rank: 3 is outside ranges.adapter.rank",
        ),
        (GRID.replace("trials: 4", "trials: 4, sampler: best"), "search.sampler: Input should be 'tpe' or 'random'"),
    ],
)
def test_mistakes_are_told_in_a_line(make_grid, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_grid(text)
    assert len(str(caught.value).splitlines()) == 1


def test_ends_that_an_option_does_not_take_are_refused(make_config, make_grid) -> None:
    with pytest.raises(ConfigError, match=r"ranges.adapter.rank: adapter.rank: .*greater than or equal to 1"):
        lay_out(make_config(), make_grid(GRID.replace("choices: [2, 4, 8]", "integers: [0, 8]")))
    with pytest.raises(ConfigError, match=r"has train.lr=0.001, outside ranges.train.lr"):
        lay_out(make_config(), make_grid(GRID.replace("[1e-5, 1e-2]", "[1e-2, 1e-1]")))


def test_the_search_goes_on_from_the_directories(
    make_config, make_grid, tmp_path: Path, write_trial_results: Callable[..., None]
) -> None:
    """Killed after two proposals, one of them finished: the same command knows both and proposes the fourth alone."""
    config, grid, placed = make_config(), make_grid(GRID), []
    trials = lay_out(config, grid)
    totals = {one.name: 7 for one in trials}
    sweep_dir = tmp_path / "runs" / "sweep"
    write_trial_results(trial_dir(sweep_dir, trials[0].name), 0.3)
    search = Proposals(config, grid, trials, totals, placed.extend)
    assert search.left == 3
    (second,), (third,) = search.next(), search.next()
    write_trial_results(trial_dir(sweep_dir, second), 0.4)
    entries = read_sweep(sweep_dir)["trials"]
    assert [each["name"] for each in entries] == [trials[0].name, second, third] == [one.name for one in trials]
    assert [one.name for one in placed] == [second, third]
    assert [each.get("proposed", False) for each in entries] == [False, True, True]

    again = lay_out(config, grid)
    assert [(one.name, one.id) for one in again] == [(each["name"], each["id"]) for each in entries]
    totals = {one.name: 7 for one in again}
    search = Proposals(config, grid, again, totals, placed.extend)
    assert search.left == 1
    write_state(trial_dir(sweep_dir, third), status="failed", error="diverged")
    assert len(search.next()) == 1
    assert (search.left, search.next()) == (0, [])
    assert all(5 <= totals[one.name] <= 9 for one in again[1:])


@pytest.mark.parametrize("kind", ["log", "linear", "integers"])
def test_whole_numbers_are_drawn_for_an_option_that_needs_them(make_config, make_grid, kind: str) -> None:
    """Also on a log scale, and a point of the grid that is not whole is outside."""
    grid = make_grid(f"search: {{trials: 6}}\nranges: {{rank: {{{kind}: [2, 64]}}}}\nfloor: 0.9\ngrid: {{rank: [2]}}")
    trials = lay_out(make_config(), grid)
    search = Proposals(make_config(), grid, trials, {trials[0].name: 12}, lambda _: None)
    while search.left:
        assert search.next()
    ranks = [one.config.adapter.rank for one in trials]
    assert len(set(ranks)) == 6
    assert all(2 <= rank <= 64 for rank in ranks)
    with pytest.raises(ConfigError, match=r"grid.gate.lam: 0.5 is outside ranges.gate.lam: integers \[0, 3\]"):
        make_grid("search: {trials: 4}\nranges: {lam: {integers: [0, 3]}}\nfloor: 0.9\ngrid: {lam: [0.5]}")


def test_ranges_that_exclude_each_other_are_refused(make_config, make_grid) -> None:
    """A budget and a lambda are valid alone and never together."""
    ranges = "ranges: {gate.budget: {integers: [2, 9]}, lam: {linear: [0, 3]}}"
    with pytest.raises(ConfigError, match="ranges: none of 50 draws is valid; the last: .*gate.budget"):
        plan_sweep(
            make_config("gate.lam=0"),
            make_grid(f"search: {{trials: 4}}\n{ranges}\nfloor: 0.9\ngrid: {{gate.budget: [3], lam: [0]}}"),
        )


def test_ranges_may_change_between_two_calls(make_config, make_grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier proposals stay trials of the sweep; the sampler learns from those in the new ranges."""
    known: list[int] = []

    def watched(ranges, tried, *rest):
        known.append(len(tried))
        return propose(ranges, tried, *rest)

    monkeypatch.setattr("pipeline.tuning.layout.propose", watched)
    config, grid = make_config(), make_grid(GRID)
    trials = lay_out(config, grid)
    search = Proposals(config, grid, trials, {one.name: 7 for one in trials}, lambda _: None)
    names = [trials[0].name, *search.next()]
    for changed in (
        GRID.replace("9]}}", "9]}, train.weight_decay: {linear: [0.0, 0.2]}}"),
        GRID.replace("train.lr: {log: [1e-5, 1e-2]}, ", "").replace("[5, 9]", "[7, 8]"),
    ):
        grid = make_grid(changed)
        trials = lay_out(config, grid)
        assert [one.name for one in trials] == names
        search = Proposals(config, grid, trials, {one.name: 7 for one in trials}, lambda _: None)
        names += search.next()
    assert len(names) == 4
    assert (known[0], known[-1]) == (1, 1)  # at last only the grid's point is comparable: it has the config's own rate
    assert trials[-1].config.train.steps in (7, 8)


def test_a_sweep_that_is_stopped_proposes_nothing(make_config, make_grid, tmp_path: Path) -> None:
    config, grid = make_config(), make_grid(GRID)
    trials = lay_out(config, grid)
    (tmp_path / "runs" / "sweep" / "stop").touch()
    assert Proposals(config, grid, trials, {}, lambda _: None).next() == []


def test_each_proposal_has_every_seed(make_config, make_grid) -> None:
    config, grid = make_config(), make_grid(GRID + "seeds: [0, 1]\nsoup: true\n")
    trials = lay_out(config, grid)
    assert len(trials) == 3
    search = Proposals(config, grid, trials, {one.name: 7 for one in trials}, lambda _: None)
    names = search.next()
    assert len(names) == 2
    assert [one.name for one in trials[3:5]] == names
    assert trials[5].soup_of == tuple(names)
    assert search.left == 2


def test_the_plan_counts_what_is_still_to_be_proposed(make_config, make_grid) -> None:
    plan = plan_sweep(make_config(), make_grid(GRID + "baselines: [{changes: {kind: full}}]\n"))
    assert (plan.trials, plan.to_come, plan.steps) == (5, 3, 7 + 12 + 3 * 12)


def test_proposals_of_another_command_are_kept(make_config, make_grid, tmp_path: Path, monkeypatch) -> None:
    """They were made between this command's first look and its lock."""
    config, grid, made = make_config(), make_grid(GRID), []
    trials = lay_out(config, grid)

    class Late(SweepRuns):
        def __enter__(self) -> Late:
            made.extend(Proposals(config, grid, list(trials), {one.name: 7 for one in trials}, lambda _: None).next())
            return self

    monkeypatch.setattr("pipeline.tuning.mlflow_runs.SweepRuns", Late)
    monkeypatch.setattr("pipeline.tuning.sweep._run", lambda *_: None)
    sweep(config, grid)
    names = [each["name"] for each in read_sweep(tmp_path / "runs" / "sweep")["trials"]]
    assert len(made) == 1
    assert names == [trials[0].name, *made]


def test_a_plan_needs_no_data_where_steps_are_known(make_config, make_grid, tmp_path: Path) -> None:
    grid = make_grid("grid: {rank: [2, 4]}\nfloor: 0.95")
    gone = (f"data.train={tmp_path}/nowhere", "eval.root=nowhere")
    plan = plan_sweep(make_config(*gone), grid)
    assert plan.steps == 24
    assert "nowhere" in plan.absent[0]
    epochs = make_config(*gone, "train.steps=null", "train.epochs=3")
    with pytest.raises(ConfigError, match="a plan without the shards needs --samples N, or train.steps"):
        plan_sweep(epochs, grid)
    assert plan_sweep(epochs, grid, samples=160).steps == 2 * 3 * 10


def test_a_plan_does_not_need_the_machines_of_the_sweep(make_config, make_grid) -> None:
    plan = plan_sweep(make_config(), make_grid("grid: {rank: [2, 4]}\nresources: {cpus_per_worker: 999}"))
    assert plan.steps == 24
    assert any("a trial needs 1 worker with 999 CPUs each, and 0 fit" in line for line in plan.absent)


def test_a_plan_refuses_what_the_sweep_refuses(make_config, make_grid, tmp_path: Path) -> None:
    gone = f"data.train={tmp_path}/nowhere"
    with pytest.raises(ConfigError, match="floor: 0.9 needs results of each trial; set eval.benchmark"):
        plan_sweep(make_config(gone, "eval.benchmark=null"), make_grid("grid: {rank: [2]}\nfloor: 0.9"))
    with pytest.raises(ConfigError, match=r"max_drift: 0.2 is measured on reference data, and no trial has any"):
        plan_sweep(make_config(gone), make_grid("grid: {rank: [2]}\nmax_drift: 0.2"))


def test_a_sweep_refuses_budgets_that_the_model_cannot_have(make_config, make_grid) -> None:
    config = make_config("gate.lam=0")
    with pytest.raises(ConfigError, match=r"gate.budget=1000: must be between 1 and the 24 gated blocks$"):
        lay_out(config, make_grid("grid: {gate.budget: [4, 1000]}"))
    ranges = "ranges: {gate.budget: {integers: [2, 900]}}"
    with pytest.raises(ConfigError, match=r"gate.budget=900: must be between 1 and the 24 gated blocks$"):
        lay_out(config, make_grid(f"search: {{trials: 4}}\n{ranges}\nfloor: 0.9\ngrid: {{gate.budget: [4]}}"))
    with pytest.raises(ConfigError, match=r"gate.budget_parameters=1: must be between \d+ and the \d+ parameters"):
        lay_out(config, make_grid("grid: {gate.budget_parameters: [1]}"))
