"""A search on real Ray: after a kill it repeats nothing; a failed seed does not lose its configuration."""

from __future__ import annotations

import json
import signal

import pytest

from pipeline.runs.results import read_floors
from pipeline.runs.sweep import read_soup, read_state, read_sweep, trial_dir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RESOURCES = "resources: {workers: 1, cpus_per_worker: 1, eval_cpus: 1, concurrent: 1}\n"
SEARCH = (
    "grid: {rank: [2], train.lr: [1.0e-3]}\nsearch: {trials: 4, sampler: tpe}\nfloor: 0.9\n"
    "ranges:\n  rank: {choices: [2, 4, 8]}\n  train.lr: {log: [1.0e-5, 1.0e-2]}\n"
    "baselines: [{name: full, changes: {kind: full}}]\n" + RESOURCES
)


def test_a_search_killed_on_its_way_repeats_nothing(command, make_config, known) -> None:
    sweep = command(
        make_config("train.steps=40", "train.checkpoint_every=10", f"eval.benchmark={known}"), SEARCH
    ).start()

    def entries() -> list[dict]:
        return read_sweep(sweep.directory)["trials"] if (sweep.directory / "sweep.json").exists() else []

    def proposed() -> list[str]:
        return [each["name"] for each in entries() if each.get("proposed")]

    for number in (1, 2):  # while the first proposal trains, and while the second does
        sweep.until(lambda number=number: len(proposed()) >= number, f"proposal {number}")
        name = proposed()[number - 1]
        sweep.until(lambda name=name: max(sweep.losses(name), default=0) >= 5, f"step 5 of {name}")
        sweep.signal(signal.SIGKILL)
        sweep.wait()
        before = {each["name"]: read_state(sweep.run_dir(each["name"])) for each in entries()}
        sweep.start()
    assert sweep.wait() == 0, sweep.text()
    found = entries()
    assert [each.get("proposed", False) for each in found] == [False, False, True, True, True]
    assert len({json.dumps(each["changes"], sort_keys=True) for each in found}) == 5
    for each in found:
        state = read_state(sweep.run_dir(each["name"]))
        assert state.status == "finished"
        if each["name"] in before and before[each["name"]].status == "finished":
            assert state == before[each["name"]]
        floors = read_floors(sweep.run_dir(each["name"]) / "eval")
        assert floors is not None and floors["floor"] == 0.9
    assert "id@90*" in sweep.text()
    names = [each["name"] for each in found]
    assert sweep.start().wait() == 0, sweep.text()
    assert [each["name"] for each in entries()] == names


def test_seeds_with_a_failing_one_and_their_soup(command, make_config, known) -> None:
    """One seed first, then three and their soup: the first is not trained again, and the one that fails is named."""
    config, grid = make_config("train.steps=12", f"eval.benchmark={known}"), "grid: {rank: [2, 4]}\n" + RESOURCES
    sweep = command(config, grid)
    assert sweep.run() == 0, sweep.text()
    first = read_state(sweep.run_dir("gated_lora_r2_lam1"))
    more = command(config, grid + "seeds: [0, 1, 2]\nsoup: true\nfloor: 0.9\n").start()
    lost = more.run_dir("gated_lora_r2_lam1_seed2")
    more.until(lost.is_dir, "the directory of the third seed")
    (lost / "checkpoints").write_text("not a directory")
    assert more.wait() == 1, more.text()
    again = read_state(more.run_dir("gated_lora_r2_lam1"))
    assert (again.status, again.step) == (first.status, first.step)
    assert more.statuses("gated_lora_r2_lam1").count("RUNNING") == 1
    assert read_state(lost).status == "failed"
    soup = read_soup(trial_dir(more.directory, "gated_lora_r2_lam1_soup"))
    assert soup is not None and soup.made_of == ["gated_lora_r2_lam1", "gated_lora_r2_lam1_seed1"]
    assert read_state(more.run_dir("gated_lora_r4_lam1_soup")).status == "finished"
    assert "without gated_lora_r2_lam1_seed2" in more.text()
