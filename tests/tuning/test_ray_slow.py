"""Faults of long sweeps on real Ray and MLflow: a dead driver, Ctrl-C, failing trials, early stops, two nodes."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port
from sweep_by_hand import lay_out

from pipeline.tuning.cluster.forked import PRELOAD

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RESOURCES = "resources: {workers: 2, cpus_per_worker: 0.5, eval_cpus: 0.5%s}\n"
THREE = "grid: {rank: [2], lam: [0.3, 1.0, 3.0]}\n"
NAMES = ("gated_lora_r2_lam0.3", "gated_lora_r2_lam1", "gated_lora_r2_lam3")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "mlflow.db"


def tracked(store: Path) -> tuple[str, str]:
    return "tracking.enabled=true", f"tracking.uri=sqlite:///{store}"


def runs(store: Path) -> dict[str, dict]:
    """name -> status, parent run's name and tags of every MLflow run, straight from the database."""
    with sqlite3.connect(store, timeout=60) as connection:
        found = {
            uuid: {"name": name, "status": status, "tags": {}}
            for uuid, name, status in connection.execute("select run_uuid, name, status from runs")
        }
        for uuid, key, value in connection.execute("select run_uuid, key, value from tags"):
            found[uuid]["tags"][key] = value
        for uuid, steps in connection.execute(
            "select run_uuid, group_concat(step) from (select * from metrics where key = 'train/loss' order by step) "
            "group by run_uuid"
        ):
            found[uuid]["steps"] = [int(step) for step in steps.split(",")]
    assert len({run["name"] for run in found.values()}) == len(found), "two runs of one name"
    for run in found.values():
        above = run["tags"].get("mlflow.parentRunId")
        run["parent"] = found[above]["name"] if above else None
    return {run["name"]: run for run in found.values()}


def groups(run_dir: Path) -> dict:
    """The accuracies of a trial's evaluation."""
    return json.loads((run_dir / "eval" / "summary.json").read_text())["groups"]


def test_the_same_command_after_a_dead_driver_runs_nothing_twice(
    command, make_config, make_grid, by_hand, store
) -> None:
    common = ("train.steps=60", "train.checkpoint_every=5")
    config, grid = make_config(*common, *tracked(store)), THREE + RESOURCES % ", concurrent: 1"
    sweep = command(config, grid).start()
    sweep.until(lambda: max(sweep.losses(NAMES[1]), default=0) >= 17, "step 17 of the second trial")
    before = sweep.state(NAMES[0])
    assert before.status == "finished"
    sweep.signal(signal.SIGKILL)
    sweep.wait()
    sweep.start()
    sweep.kill_rank_0(NAMES[2], step=12)
    assert sweep.wait() == 0, sweep.text()
    assert sweep.state(NAMES[0]) == before
    hand = command(make_config("name=hand", *common), grid)
    lay_out(make_config("name=hand", *common), make_grid(grid))
    for name in NAMES:
        by_hand(hand.directory, name)
        assert sweep.losses(name) == hand.losses(name)
        assert groups(sweep.run_dir(name)) == groups(hand.run_dir(name))
    assert [sweep.statuses(name).count("RUNNING") for name in NAMES] == [1, 2, 2]
    found = runs(store)
    assert {name: (run["status"], run["parent"]) for name, run in found.items()} == {
        "sweep": ("FINISHED", None),
        **dict.fromkeys(NAMES, ("FINISHED", "sweep")),
    }
    assert all(found[name]["steps"] == list(range(1, 61)) for name in NAMES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_every_trial_save(command, make_config, make_grid, by_hand, store, number: int) -> None:
    """A signal lets every trial save and the same command continues."""
    common = ("train.steps=3000", "train.checkpoint_every=3000", "train.log_every=5")
    config, grid = make_config(*common, *tracked(store)), THREE + RESOURCES % ", concurrent: 2"
    sweep = command(config, grid).start()
    sweep.until(lambda: max(sweep.losses(NAMES[1]), default=0) >= 20, "step 20")
    left = sweep.processes()
    sweep.signal(number, group=number == signal.SIGINT)
    assert sweep.wait() == 130, sweep.text()
    assert "The same command continues" in sweep.text()
    assert not psutil.wait_procs(left, timeout=60)[1]
    states = [sweep.state(name) for name in NAMES]
    assert [state.status for state in states] == ["waiting"] * 3
    assert states[1].step >= 20
    assert states[2].step == 0
    assert {name: run["status"] for name, run in runs(store).items()} == {
        "sweep": "KILLED",
        NAMES[0]: "KILLED",
        NAMES[1]: "KILLED",
        NAMES[2]: "SCHEDULED",
    }
    sweep.start()
    sweep.until(lambda: max(sweep.losses(NAMES[1])) > states[1].step + 20, "more steps")
    sweep.signal(signal.SIGTERM)
    assert sweep.wait() == 130, sweep.text()
    again = sweep.state(NAMES[1])
    assert again.step > states[1].step
    assert sorted(sweep.losses(NAMES[1])) == [*range(5, again.step, 5), *([again.step] if again.step % 5 == 0 else [])]


def test_hopeless_trials_fail_and_the_others_finish(command, make_config, store) -> None:
    """Hopeless trials fail with their reasons and the others finish."""
    grid = (
        "grid: {rank: [2], lam: [0.3]}\nbaselines:\n"
        "  - {name: impossible, changes: {adapter.targets: [['image.9.*']]}}\n"
        "  - {name: diverging, changes: {train.lr: 1.0e+30, train.warmup_steps: 0}}\n"
        "  - {name: hungry, changes: {rank: 1000000000}}\n"
        "  - {name: last, changes: {gate.enabled: false}}\n"
    )
    sweep = command(make_config(*tracked(store)), grid + RESOURCES % "")
    assert sweep.run() == 1, sweep.text()
    reasons = {
        "impossible": "matches none of the 24 targets",
        "diverging": "diverged: step",
        "hungry": "out of memory",
    }
    found = runs(store)
    table = (sweep.directory / "table.txt").read_text()
    for name, reason in reasons.items():
        state = sweep.state(name)
        assert state.status == "failed"
        assert reason in state.error
        assert reason in table
        assert reason in sweep.text()
        assert found[name]["status"] == "FAILED"
        assert found[name]["parent"] == "sweep"
        assert reason in found[name]["tags"]["selora.trial.reason"]
    for name in (NAMES[0], "last"):
        assert sweep.state(name).status == "finished"
        assert found[name]["status"] == "FINISHED"
    assert found["sweep"]["status"] == "FINISHED"


def test_halving_stops_the_worst_and_frees_workers(command, make_config, store) -> None:
    """Halving stops the worst and frees their workers for the next."""
    grid = (
        "grid: {train.lr: [1.0e-3, 1.0e-9, 1.1e-9, 1.0e-2]}\nasha: {grace_steps: 20, reduction: 2}\n"
        "baselines: [{name: plain, changes: {gate.enabled: false, train.lr: 1.0e-9}}]\n"
    )
    common = ("train.steps=400", "train.log_every=10", "train.checkpoint_every=100")
    sweep = command(make_config(*common, *tracked(store)), grid + RESOURCES % ", concurrent: 2")
    assert sweep.run() == 0, sweep.text()
    found = runs(store)
    states = {name: sweep.state(name) for name in found if name != "sweep"}
    assert len(states) == 5
    stopped = [name for name, state in states.items() if state.status == "stopped"]
    assert stopped
    assert "gated_lora_r4_lam1_lr0.001" not in stopped
    assert states["plain"].status == "finished"
    for name in stopped:
        assert "was behind the others'" in states[name].error
        assert found[name]["status"] == "KILLED"
        assert found[name]["tags"]["selora.trial.status"] == "stopped"
    assert {state.status for state in states.values()} == {"finished", "stopped"}


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[str, dict[str, str], list[psutil.Process]]]:
    """Two raylets with one CPU each: (address, environment of a driver, their processes)."""
    port = free_port()
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--num-cpus", "1", "--block"]
    ray += ["--object-store-memory", str(100 * 2**20)]
    head = [*ray, "--head", "--port", str(port), "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    second = [*ray, "--address", f"127.0.0.1:{port}"]
    started: list[psutil.Process] = []
    environment = {**os.environ, **variables, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    try:
        for command in (head, second):
            with (tmp_path / "ray.log").open("ab") as log:
                one = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            started.append(psutil.Process(one.pid))
            deadline = time.monotonic() + 300
            # `ray start` writes its last words once its node is up.
            while (tmp_path / "ray.log").read_text().count("Ray runtime started") < len(started):
                assert one.poll() is None and time.monotonic() < deadline, (tmp_path / "ray.log").read_text()
                time.sleep(0.5)
        yield f"127.0.0.1:{port}", variables, started
    finally:
        for one in reversed(started):
            family = [one, *one.children(recursive=True)]
            one.terminate()
            for each in psutil.wait_procs(family, timeout=30)[1]:
                each.kill()


def is_rank(process: psutil.Process) -> bool:
    """Whether a process was forked from a server of ranks; Ray's dashboard forks from a server of its own."""
    above = process.parent()
    return above is not None and all(PRELOAD[0] in " ".join(each.cmdline()) for each in (process, above))


def test_a_trial_of_two_workers_is_spread_over_two_nodes(command, make_config, make_grid, by_hand, two_nodes) -> None:
    address, variables, raylets = two_nodes
    grid = "grid: {rank: [2], lam: [0.3]}\nresources: {workers: 2, cpus_per_worker: 0.8, eval_cpus: 1}\n"
    common = ("train.steps=60", "train.checkpoint_every=20")
    sweep = command(make_config(*common), grid, "--address", address, **variables).start()
    sweep.until(lambda: max(sweep.losses(NAMES[0]), default=0) >= 5, "step 5")
    ranks = [[each.pid for each in node.children(recursive=True) if is_rank(each)] for node in raylets]
    assert [len(pids) for pids in ranks] == [1, 1], ranks
    assert sweep.wait() == 0, sweep.text()
    assert "2 nodes" in sweep.text()
    hand = command(make_config("name=hand", *common), grid)
    lay_out(make_config("name=hand", *common), make_grid(grid))
    by_hand(hand.directory, NAMES[0])
    assert sweep.losses(NAMES[0]) == hand.losses(NAMES[0])
