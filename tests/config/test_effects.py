"""The effect of an option is declared on the option, and everything else is derived from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import Config, Effect, affects_result, digest, effects, override
from pipeline.config.effects import Result, effects_of
from pipeline.config.sections import Section
from pipeline.report.records import Run
from pipeline.report.series import configurations, labels
from pipeline.training.settings import changed_settings
from pipeline.tuning.grid import load_grid
from pipeline.tuning.trials import expand, keep_names

BASE = Config.model_validate({"data": {"train": "x"}})
# Another legal value of every option that leaves the trained weights alone.
OTHER = {
    "name": "another",
    "out": "elsewhere",
    "train.micro_batch_size": 8,
    "train.activation_checkpointing": True,
    "train.device": "cpu",
    "train.compile": True,
    "train.zero_stage": 2,
    "train.log_every": 3,
    "train.gates_every": 7,
    "train.checkpoint_every": 11,
    "train.keep_last": 5,
    "train.timeout_s": 60.0,
    "keep.allow_overlap": True,
    "data.workers": 4,
    "data.read_ahead": 0,
    "data.max_bad_share": 0.5,
    "eval.benchmark": "paper",
    "eval.root": "sets",
    "eval.datasets": ["pets"],
    "eval.batch_size": 8,
    "eval.workers": 4,
    "eval.precision": "bf16",
    "eval.preprocessing": "fast",
    "eval.cache": "off",
    "tracking.uri": "http://127.0.0.1:1",
    "tracking.experiment": "other",
    "tracking.enabled": False,
    "tracking.machine_every_s": 5.0,
    "promote.min_id": 0.5,
    "promote.min_gain": 0.1,
    "promote.max_forgetting": 0.1,
    "promote.max_drop": 0.1,
    "promote.min_kept": 0.9,
    "promote.min_dataset": ["pets >= 0.8"],
    "promote.champion": "always",
}


def run(name: str, **changes: object) -> Run:
    config = {"adapter.kind": "lora", "adapter.rank": 4, "gate.enabled": True, "gate.lam": 1.0, "gate.penalty": "l1"}
    config |= {"seed": 0, "model.name": "x", "name": name}
    return Run(name, name, config | changes, "finished")


def test_every_option_has_exactly_one_effect():
    assert set(effects().values()) == set(Effect)
    for key, effect in effects().items():
        assert (effect is Effect.RESULT) == affects_result(key)


def test_option_without_an_effect_is_named():
    class Bare(Section):
        depth: int = 3

    class Twice(Section):
        depth: Result[Result[int]] = 3

    with pytest.raises(TypeError, match=r"new\.depth: an option needs exactly one effect and has 0"):
        effects_of(Bare, "new.")
    with pytest.raises(TypeError, match=r"has 2; write its type in .*Result\[\.\.\]"):
        effects_of(Twice, "new.")


def test_list_of_options_that_leave_the_weights_alone_is_known():
    """Whoever adds an option says here as well that it does not affect the weights, with a value to prove it by."""
    assert {key for key in effects() if not affects_result(key)} == set(OTHER)


@pytest.mark.parametrize("key", OTHER)
def test_digest_and_continuation_ignore_what_is_no_result(key):
    other = override(BASE, {key: OTHER[key]})
    assert other != BASE
    assert digest(other) == digest(BASE)
    assert changed_settings(BASE, other) == []


def test_digest_and_continuation_follow_every_result():
    changes = {"seed": 1, "model.precision": "bf16", "adapter.rank": 4, "gate.lam": 2.0, "train.lr": 1.0}
    changes |= {"data.flip": True, "train.global_batch_size": 1024, "data.max_pixels": 5}
    assert len({digest(override(BASE, {key: value})) for key, value in changes.items()} | {digest(BASE)}) == 9
    for key, value in changes.items():
        assert changed_settings(BASE, override(BASE, {key: value})) == [
            f"  {key}: {BASE.seed if key == 'seed' else getattr(getattr(BASE, key.split('.')[0]), key.split('.')[1])}"
            f" -> {value}"
        ]


def test_seeds_are_averaged_whatever_the_workers():
    runs = [run("a", seed=0, **{"data.workers": 2}), run("b", seed=1, **{"data.workers": 8, "train.zero_stage": 2})]
    assert configurations([*runs, run("c", seed=1, **{"train.lr": 0.1})]) == [
        runs,
        [run("c", seed=1, **{"train.lr": 0.1})],
    ]


def test_labels_leave_out_speed_and_name_what_decides():
    found = labels([run("a", **{"train.micro_batch_size": None, "train.lr": 0.1}), run("b", **{"train.lr": 0.2})])
    assert found == {"a": "gated LoRA, train.lr 0.1", "b": "gated LoRA, train.lr 0.2"}


def test_grid_over_speed_has_all_its_points(tmp_path: Path):
    """They train the same weights, and somebody wants to know how fast each is."""
    (tmp_path / "grid.yaml").write_text("grid: {data.workers: [0, 1, 2]}")
    assert len(expand(BASE, load_grid(tmp_path / "grid.yaml"))) == 3


def test_continued_sweep_keeps_its_names_and_ids(tmp_path: Path):
    """Ids and suffixes made by another version's digest stay; a point that is new is numbered after the old ones."""
    path = tmp_path / "grid.yaml"
    twins = [{"name": "own", "changes": {"train.lr": rate}} for rate in (0.1, 0.2, 0.3)]
    path.write_text(json.dumps({"baselines": twins[:2]}))
    first, second = expand(BASE, load_grid(path))
    assert second.name.startswith(f"{first.name}_")
    entries = [
        {"id": "0000-aaaaaaaaaaaa", "name": "own", "changes": first.changes, "baseline": True},
        {"id": "0001-bbbbbbbbbbbb", "name": "own_beef", "changes": second.changes, "baseline": True},
    ]
    path.write_text(json.dumps({"baselines": [twins[1], twins[2], twins[0]]}))
    kept = keep_names(expand(BASE, load_grid(path)), json.loads(json.dumps(entries)), BASE.seed)
    assert kept[1].id == f"0002-{digest(kept[1].config)}"
    for entry, one in zip(entries, (kept[2], kept[0]), strict=True):
        assert (one.id, one.name, one.config.name) == (entry["id"], entry["name"], entry["name"])
