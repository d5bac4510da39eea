"""The cost of a sweep is counted before it starts; numbers tell which machines lack room for a trial."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError
from pipeline.training.model import attach_blocks, load_untouched, trainable
from pipeline.tuning.grid import Resources
from pipeline.tuning.plan import (
    Capacity,
    Node,
    Speed,
    checkpoint_bytes,
    concurrency,
    describe_plan,
    make_plan,
    room_faults,
    trained_parameters,
)
from pipeline.tuning.search import configs_at_ends
from pipeline.tuning.sweep import _Room
from pipeline.tuning.trials import expand

EIGHT_CARDS = Capacity((Node("a", 32, 4), Node("b", 32, 4)))


@pytest.fixture
def trials(make_config, make_grid):
    return expand(make_config(), make_grid("grid: {rank: [2, 4, 8], lam: [0.3, 1.0]}"))


def test_waves_steps_and_hours_follow_from_what_is_left(trials) -> None:
    resources = Resources(workers=4, cpus_per_worker=4, gpus_per_worker=1)
    steps = {trial.name: 1800 for trial in trials[1:]} | {trials[1].name: 900}
    plan = make_plan(trials, steps, resources, EIGHT_CARDS, speed=Speed(2.0, "as given"))
    assert (plan.trials, plan.done, plan.concurrent, plan.waves, plan.steps) == (6, 1, 2, 3, 4 * 1800 + 900)
    assert plan.gpu_hours == pytest.approx(8100 * 2 * 4 / 3600)
    assert plan.cpu_hours == pytest.approx(8100 * 2 * 16 / 3600)
    text = describe_plan(plan)
    assert "6, 1 of them over" in text
    assert "3 of 2 trials at a time" in text
    assert "18 GPU-hours, about 2.2 h of training (2 s a step, as given)" in text


def test_without_a_measured_step_hours_are_not_made_up(trials) -> None:
    plan = make_plan(trials, {trial.name: 12 for trial in trials}, Resources(), EIGHT_CARDS)
    assert plan.gpu_hours is None
    assert "none of the 8 are used: set resources.gpus_per_worker=1" in describe_plan(plan)
    assert "not known: no run here has measured a step yet" in describe_plan(plan)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "expected"),
    [
        (1, 1, 0, 6),
        (8, 1, 0, 6),
        (8, 4, 0, 2),
        (16, 4, 0, 1),
        (1, 1, 1, 6),
        (2, 1, 1, 4),
        (1, 1, 0.5, 6),
        (4, 1, 0.3, 6),
    ],
)
def test_concurrency_counts_what_fits_on_each_machine(workers: int, cpus: float, gpus: float, expected: int) -> None:
    resources = Resources(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    assert concurrency(resources, EIGHT_CARDS, 6) == expected


def test_a_process_is_not_spread_over_two_machines() -> None:
    assert Capacity((Node("a", 3, 0), Node("b", 3, 0))).processes(2, 0) == 2
    assert Capacity((Node("a", 2, 0),)).processes(0.1, 0) == 20
    assert Capacity((Node("a", 8, 1.5),)).processes(1, 0.4) == 2


def test_a_trial_that_cannot_fit_is_told(trials) -> None:
    """With what it needs and what there is."""
    resources = Resources(workers=3, cpus_per_worker=2, gpus_per_worker=1, eval_cpus=64)
    text = "\n".join(room_faults(resources, Capacity((Node("here", 2, 0),))))
    assert "a trial needs 3 workers with 2 CPUs and 1 GPU each, and 0 fit this cluster" in text
    assert "1 node (here: 2 CPUs 0 GPUs)" in text
    assert "an evaluation needs 64 CPUs" in text
    assert "lower them in section resources of the grid file, or name a larger cluster with --address" in text
    with pytest.raises(
        ConfigError, match=f"{trials[0].name}: train.global_batch_size: 16 cannot be shared by 3 workers"
    ):
        make_plan(trials, {}, resources, EIGHT_CARDS)


def test_a_node_that_comes_back_with_fewer_gpus_is_told(monkeypatch, capsys) -> None:
    """Once when the room goes, once when it is back; a node that is merely smaller is no news."""
    monkeypatch.setattr("pipeline.tuning.sweep._ROOM_SECONDS", 0.0)
    gpus = iter([8, 4, 2, None, 0, 8, 8])

    def look() -> Capacity:
        if (found := next(gpus)) is None:
            raise ConnectionError("the head does not answer")
        return Capacity((Node("n", 32, found),))

    room = _Room(Resources(workers=4, cpus_per_worker=1, gpus_per_worker=1), look)
    said = []
    for _ in range(7):
        room.tick()
        said.append(capsys.readouterr().err)
    assert [bool(text) for text in said] == [False, False, True, False, False, True, False]
    assert said[2] == (
        "resources: a trial needs 4 workers with 1 CPU and 1 GPU each, and 2 fit this cluster: 1 node (n: 32 "
        "CPUs 2 GPUs); trials wait for a node with room. Ctrl-C ends the sweep, and the same command continues it\n"
    )
    assert said[5] == "the cluster has room for a trial again\n"


def test_what_trains_is_counted_as_it_is_built(make_config, make_grid) -> None:
    baselines = "baselines: [{changes: {kind: [full, none]}}, {changes: {adapter.random_k: 3, gate.enabled: false}}]"
    trials = expand(make_config("train.train_rest=proj_ln"), make_grid(f"grid: {{kind: [lora, dora]}}\n{baselines}"))
    counted = trained_parameters(trials)
    for trial in trials:
        model = attach_blocks(trial.config, load_untouched(trial.config)).model
        built = sum(parameter.numel() for _, parameter in trainable(model))
        assert counted[trial.name] == built, trial.name
    assert checkpoint_bytes(trials, counted) == sum(counted.values()) * 12 * 3


def test_more_blocks_than_the_model_has_are_refused(make_config, make_grid) -> None:
    trials = expand(make_config("gate.lam=0"), make_grid("grid: {gate.budget: [24, 25]}"))
    with pytest.raises(ConfigError, match=r"budget25: gate.budget=25: must be between 1 and the 24 gated blocks$"):
        trained_parameters(trials)
    search = make_grid("search: {trials: 4}\nranges: {gate.budget: {integers: [1, 25]}}\nfloor: 0.9")
    ends = configs_at_ends(make_config("gate.lam=0"), search.ranges)
    with pytest.raises(ConfigError, match=r"gate.budget=25: must be between 1 and the 24 gated blocks$"):
        trained_parameters([], ends)
