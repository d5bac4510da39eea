"""A grid file becomes trials, or one message with all of its faults."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError, load_config, override
from pipeline.tuning.grid import load_grid
from pipeline.tuning.trials import expand


def names(config, grid) -> list[str]:
    return [trial.name for trial in expand(config, grid)]


def test_the_product_of_the_axes_has_readable_names_and_labels(make_config, make_grid) -> None:
    grid = make_grid("grid: {kind: [lora, dora], rank: [2, 16], lam: [0.3]}")
    trials = expand(make_config(), grid)
    assert [trial.name for trial in trials] == [
        "gated_lora_r2_lam0.3",
        "gated_lora_r16_lam0.3",
        "gated_dora_r2_lam0.3",
        "gated_dora_r16_lam0.3",
    ]
    assert trials[3].label == "gated DoRA r16 λ0.3"
    assert trials[3].changes == {"adapter.kind": "dora", "adapter.rank": 16, "gate.lam": 0.3}
    assert (trials[3].config.adapter.kind, trials[3].config.adapter.rank) == ("dora", 16)
    assert trials[3].config.out.endswith("/runs/sweep/trials")
    assert trials[3].id.startswith("0003-")


def test_options_that_vary_are_in_the_name(make_config, make_grid) -> None:
    """Seeds and other options are in the name where they vary."""
    grid = make_grid("grid:\n  seed: [0, 1]\n  train.lr: [1e-3]\n  train: {betas: [[0.9, 0.99], [0.8, 0.99]]}\n")
    assert names(make_config(), grid) == [
        "gated_lora_r4_lam1_0.9-0.99_seed0",
        "gated_lora_r4_lam1_0.8-0.99_seed0",
        "gated_lora_r4_lam1_0.9-0.99_seed1",
        "gated_lora_r4_lam1_0.8-0.99_seed1",
    ]


def test_baselines_stand_beside_the_grid_and_may_vary_themselves(make_config, make_grid) -> None:
    grid = make_grid(
        "grid: {rank: [2]}\nbaselines:\n"
        "  - {name: flyp, label: full (FLYP), changes: {kind: full, train: {lr: 3e-4}}}\n"
        "  - {name: ungated, changes: {gate.enabled: false, rank: [2, 8]}}\n"
        "  - {changes: {adapter.random_k: 5}}\n"
    )
    trials = expand(make_config(), grid)
    assert [(trial.name, trial.baseline) for trial in trials] == [
        ("gated_lora_r2_lam1", False),
        ("flyp", True),
        ("ungated_r2", True),
        ("ungated_r8", True),
        ("lora_r4_random5", True),
    ]
    assert trials[1].label == "full (FLYP)"
    assert trials[1].config.train.lr == 3e-4
    assert trials[3].label == "LoRA r8"


def test_points_without_a_difference_are_one_trial(make_config, make_grid) -> None:
    """Points that differ only where it has no effect are one trial."""
    grid = make_grid("grid: {kind: [full, lora], gate.enabled: [true, false], rank: [2, 4], lam: [0.3, 1]}")
    assert names(make_config(), grid) == [
        "full",
        "gated_lora_r2_lam0.3",
        "gated_lora_r2_lam1",
        "gated_lora_r4_lam0.3",
        "gated_lora_r4_lam1",
        "lora_r2",
        "lora_r4",
    ]


def test_a_repeated_baseline_of_the_grid_is_one_trial(make_config, make_grid) -> None:
    grid = make_grid("grid: {rank: [2, 4]}\nbaselines: [{name: again, changes: {rank: 4}}]")
    assert names(make_config(), grid) == ["gated_lora_r2_lam1", "gated_lora_r4_lam1"]


def test_every_fault_of_the_file_comes_in_one_message(make_grid) -> None:
    with pytest.raises(ConfigError) as caught:
        make_grid(
            "grid: {rnak: [2], lam: 0.3, rank: [2, 2], out: [a]}\nworkers: 2\nbaselines: [{name: x}]\n"
            "resources: {wrokers: 2}\nasha: {reduction: 1}\n"
        )
    text = str(caught.value)
    assert "rnak: unknown option, did you mean rank?" in text
    assert "grid.lam: should be a list of values, got 0.3" in text
    assert "grid.rank: 2 is given twice" in text
    assert "out: belongs to the sweep's config" in text
    assert "workers: unknown, a grid file has grid, baselines, search, ranges, seeds, soup" in text
    assert "baselines[1]: needs `changes`" in text
    assert "resources.wrokers" in text
    assert "asha.grace_steps" in text
    assert "asha.reduction" in text
    assert "grid.yaml:1" in text


def test_a_single_fault_is_a_single_line(make_grid) -> None:
    with pytest.raises(
        ConfigError, match=r"^\S+grid.yaml: ranges.train.lr: log: is empty, 0.001 is not below 0.001 \(\S+\)$"
    ):
        make_grid("search: {trials: 4}\nranges: {train.lr: {log: [1.0e-3, 1.0e-3]}}\nfloor: 0.95\n")


def test_a_repeated_key_of_the_grid_is_an_error(make_grid) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        make_grid("grid:\n  rank: [2]\n  rank: [4]\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {rank: [2, 4], adapter.rank: [8]}", "grid.adapter.rank: adapter.rank is given twice"),
        ("baselines: [{changes: {lam: 1, gate.lam: 2}}]", "baselines.1..gate.lam: gate.lam is given twice"),
        ("baselines: [{name: 2024, changes: {kind: full}}]", 'name: should be text, as in name: "2024"; got 2024'),
        ("baselines: [{label: false, changes: {kind: full}}]", 'label: should be text, as in label: "false"; got'),
        ("baselines: [{name: .., changes: {kind: full}}]", "name: should begin with a letter from a to z, a digit or"),
    ],
)
def test_a_mistake_in_a_name_is_a_single_line(make_grid, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_grid(text)
    assert len(str(caught.value).splitlines()) == 1


def test_long_values_have_names_that_a_directory_can_have(make_config, make_grid) -> None:
    long = "a photo of " * 30
    made = names(make_config(), make_grid(f"grid: {{data.templates: [['{long} {{c}}'], ['{long} the {{c}}']]}}"))
    assert len(set(made)) == 2
    assert all(len(f"{name}_seed123_soup") < 255 for name in made)


def test_every_point_is_checked_before_anything_starts(make_config, make_grid) -> None:
    grid = make_grid("grid: {rank: [2, 0], lam: [0.3, -1]}\nbaselines: [{changes: {gate.init: 0.01}}]")
    with pytest.raises(ConfigError) as caught:
        expand(make_config(), grid)
    text = str(caught.value)
    assert "adapter.rank=0, gate.lam=-1: adapter.rank" in text
    assert "adapter.rank=2, gate.lam=-1: gate.lam" in text
    assert "every gate would start closed" in text


def test_a_trial_is_the_same_run_whatever_the_sweep_is_called(make_config, make_grid) -> None:
    grid = make_grid("grid: {rank: [2]}")
    one, other = expand(make_config(), grid)[0], expand(make_config("name=other"), grid)[0]
    assert one.id == other.id
    assert override(other.config, {"out": one.config.out}) == one.config


@pytest.mark.parametrize(
    ("config", "file", "trials", "baselines"),
    [("imagenet_vit_b16.yaml", "paper.yaml", 24, 9), ("own_data.yaml", "own_data.yaml", 6, 3)],
)
def test_shipped_grids_fit_their_configs(repository, config: str, file: str, trials: int, baselines: int) -> None:
    found = expand(load_config(repository / "configs" / config), load_grid(repository / "configs" / "grids" / file))
    assert sum(not trial.baseline for trial in found) == trials
    assert sum(trial.baseline for trial in found) == baselines
    assert len({trial.name for trial in found}) == len(found)
