"""One trial without Ray: its directory before, during and after the run, by hand as under Ray."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from sweep_by_hand import lay_out

from pipeline.config import ConfigError
from pipeline.runs.sweep import TrialState, read_alarm, read_state, read_sweep, trial_dir, write_state, write_sweep
from pipeline.tuning.progress import describe, last_values, line_of, measured_speed, rows
from pipeline.tuning.sweep import plan_sweep
from pipeline.tuning.trial import StopWatch, after_training, begin, final_reason, train_stage

ONE = "grid: {rank: [2], lam: [0.3]}"
NAME = "gated_lora_r2_lam0.3"


def test_by_hand_a_trial_trains_evaluates_and_says_so(make_config, make_grid, by_hand, tmp_path) -> None:
    config = make_config("tracking.enabled=false")
    trials = lay_out(config, make_grid(ONE))
    sweep_dir = tmp_path / "runs" / "sweep"
    run_dir = trial_dir(sweep_dir, NAME)
    assert read_state(run_dir).status == "waiting"
    by_hand(sweep_dir, NAME, world=1)
    state = read_state(run_dir)
    assert (state.status, state.step, state.total_steps, state.attempts) == ("finished", 12, 12, 1)
    summary = json.loads((run_dir / "eval" / "summary.json").read_text())
    assert set(summary["datasets"]) == {"own", "other"}
    assert len(list((sweep_dir / "baselines").glob("*/own.json"))) == 1
    table = describe(sweep_dir, trials)
    assert f"{NAME}  finished  12/12" in table
    assert f"{100 * summary['groups']['id']['mean']:.1f}" in table
    assert measured_speed(sweep_dir, trials) is not None
    plan = plan_sweep(config, make_grid(ONE))
    assert (plan.trials, plan.done, plan.steps) == (1, 1, 0)
    assert plan.speed is not None
    assert plan.speed.source == "median of 1 trial of this sweep"


def test_a_diverging_trial_fails_with_its_step(make_config, make_grid, by_hand, tmp_path) -> None:
    """A diverging trial is failed with the step and what to do."""
    trials = lay_out(make_config("train.lr=1e30", "train.warmup_steps=0"), make_grid(ONE))
    sweep_dir = tmp_path / "runs" / "sweep"
    by_hand(sweep_dir, NAME, world=1)
    state = read_state(trial_dir(sweep_dir, NAME))
    assert state.status == "failed"
    assert state.error is not None
    assert state.error.startswith("diverged: step ")
    assert "Lower train.lr" in state.error
    assert "failed" in line_of(rows(sweep_dir, trials)[0])


def test_a_failure_that_would_repeat_itself_is_not_tried_again(make_config, make_grid, tmp_path) -> None:
    lay_out(make_config("adapter.targets=['image.9.*']"), make_grid(ONE))
    sweep_dir = tmp_path / "runs" / "sweep"
    run_dir = trial_dir(sweep_dir, NAME)
    begin(run_dir)
    with pytest.raises(ConfigError):
        train_stage(sweep_dir, NAME)
    train_stage(sweep_dir, NAME)  # what a restarted worker does: it returns at once
    state = after_training(run_dir)
    assert state.status == "failed"
    assert state.error is not None
    assert "matches none of the 24 targets" in state.error
    assert begin(run_dir).attempts == 2
    assert not (run_dir / "failure.txt").exists()


def test_an_asked_for_stop_ends_no_training_that_has_not_begun(make_config, make_grid, tmp_path) -> None:
    lay_out(make_config(), make_grid(ONE))
    sweep_dir = tmp_path / "runs" / "sweep"
    (sweep_dir / "stop").touch()
    train_stage(sweep_dir, NAME)
    assert after_training(trial_dir(sweep_dir, NAME)).status == "waiting"
    assert not (trial_dir(sweep_dir, NAME) / "checkpoints").exists()


def test_a_trial_without_readable_checkpoints_fails(make_config, make_grid, by_hand, tmp_path) -> None:
    """A damaged pointer, and a file in the place of the directory: the reason has the path."""
    config, grid = make_config(), make_grid("grid: {rank: [2, 4]}")
    trials = lay_out(config, grid)
    sweep_dir = tmp_path / "runs" / "sweep"
    first, second = (trial_dir(sweep_dir, trial.name) / "checkpoints" for trial in trials)
    first.mkdir(parents=True)
    (first / "latest").write_text("nonsense\n")
    second.parent.mkdir(parents=True, exist_ok=True)
    second.write_text("not a directory")
    for trial, place in zip(trials, (first, second), strict=True):
        by_hand(sweep_dir, trial.name, world=1)
        state = read_state(trial_dir(sweep_dir, trial.name))
        assert (state.status, state.step) == ("failed", 0)
        assert state.error is not None
        assert str(place) in state.error


def test_running_out_of_memory_is_a_reason() -> None:
    """Memory that runs out is a reason and a lost peer is none."""
    assert final_reason(MemoryError()) == "out of memory: MemoryError"
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")
    assert (
        final_reason(error)
        == "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    )
    assert final_reason(RuntimeError("Connection reset by peer")) is None


def test_an_old_name_keeps_its_trials_and_takes_new_ones(make_config, make_grid, tmp_path) -> None:
    lay_out(make_config(), make_grid(ONE))
    longer = lay_out(make_config("train.log_every=5"), make_grid("grid: {rank: [2, 4], lam: [0.3]}"))
    assert len(longer) == 2
    with pytest.raises(ConfigError) as caught:
        lay_out(make_config("train.lr=0.5"), make_grid("grid: {rank: [4], lam: [0.3]}"))
    text = str(caught.value)
    assert "holds a sweep with other settings" in text
    assert f"{NAME} (gated LoRA r2 λ0.3) is no longer in the grid" in text
    assert "gated_lora_r4_lam0.3:\n  train.lr: 0.001 -> 0.5" in text
    content = read_sweep(tmp_path / "runs" / "sweep")
    assert content is not None
    assert [trial["name"] for trial in content["trials"]] == [NAME, "gated_lora_r4_lam0.3"]


def test_missing_data_is_an_error_before_anything_is_written(make_config, make_grid, tmp_path) -> None:
    """Data that is not there is reported before anything is written."""
    with pytest.raises(ConfigError, match="nowhere"):
        lay_out(make_config(), make_grid(f"grid: {{data.train: [{tmp_path}/nowhere]}}"))
    assert not (tmp_path / "runs").exists()


def record_of(step: int) -> dict[str, Any]:
    return {"seq": step, "time_ms": 0, "kind": "metrics", "step": step, "values": {"train/loss": step}}


@pytest.mark.parametrize(
    "broken", ["\0" * 80, '{"seq":2,"time_ms":0,"kind":"metr', "17"], ids=["zeros", "torn", "no record"]
)
def test_an_unreadable_line_does_not_stop_the_table(tmp_path, broken: str) -> None:
    first, last = (json.dumps(record_of(step)) for step in (1, 3))
    (tmp_path / "journal.jsonl").write_text(f"{first}\n{broken}\n{last}\n")
    assert last_values(tmp_path) == (3, {"train/loss": 3.0})


def test_a_torn_journal_and_a_missing_one_do_not_stop_the_table(tmp_path) -> None:
    assert read_state(tmp_path) == TrialState()
    assert last_values(tmp_path) == (0, {})
    lines = [json.dumps(record_of(step)) for step in (1, 2)]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + '\n{"kind":"metr')
    assert last_values(tmp_path) == (2, {"train/loss": 2.0})
    write_state(tmp_path, status="failed", error="why")
    assert read_state(tmp_path).error == "why"


KEEP = ("keep.weight=0.1", "keep.texts={texts}", "keep.batch_size=8", "train.gates_every=2")


def test_a_trial_that_drifts_too_far_is_stopped_and_says_so(make_config, make_grid, by_hand, tmp_path) -> None:
    """Stopped at its first measured drift; with a higher limit the same sweep lets it go on to its end."""
    (tmp_path / "texts.txt").write_text("\n".join(f"a thing of kind {i}" for i in range(64)))
    config = make_config(*(each.format(texts=tmp_path / "texts.txt") for each in KEEP))
    (trial,) = lay_out(config, make_grid("max_drift: 1.0e-9\n" + ONE))
    sweep_dir = tmp_path / "runs" / "sweep"
    run_dir = trial_dir(sweep_dir, trial.name)
    by_hand(sweep_dir, trial.name, world=2)
    state = after_training(run_dir)
    assert state.status == "stopped" and state.step < 12
    assert state.error is not None
    assert "its drift 0." in state.error and state.error.endswith("is above max_drift 1e-09")
    lay_out(config, make_grid("max_drift: 1.0e-9\n" + ONE))
    assert read_state(run_dir).status == "stopped"
    lay_out(config, make_grid("max_drift: 1.9\n" + ONE))
    assert read_state(run_dir).status == "waiting"
    by_hand(sweep_dir, trial.name, world=1)
    assert (read_state(run_dir).status, read_state(run_dir).step) == ("finished", 12)


@pytest.mark.parametrize("drift", [math.nan, math.inf])
def test_a_drift_that_is_not_finite_raises_no_alarm(make_config, tmp_path, drift: float) -> None:
    """The next step reports that the run diverges; the alarm is a file, and JSON has no such number."""
    write_sweep(tmp_path, make_config(), {}, [], max_drift=0.2)
    trial_dir(tmp_path, NAME).mkdir(parents=True)
    watch = StopWatch(tmp_path, NAME)
    watch.recorded(3, {"keep/drift_image": drift})
    assert not watch.stop_requested()
    watch.recorded(4, {"keep/drift_image": 0.3})
    alarm = read_alarm(trial_dir(tmp_path, NAME))
    assert watch.stop_requested() and alarm is not None
    assert (alarm["step"], alarm["drift"], alarm["limit"]) == (4, 0.3, 0.2)


def test_a_limit_on_drift_without_reference_data_is_a_mistake(make_config, make_grid) -> None:
    with pytest.raises(ConfigError, match=r"max_drift: 0.1 is measured on reference data, and no trial has any"):
        lay_out(make_config(), make_grid("max_drift: 0.1\n" + ONE))
