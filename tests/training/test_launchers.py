"""The command under the launchers that users have: the same losses under each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.config import ConfigError
from pipeline.training.cluster.distributed import read_world


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "journal.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["values"]["train/loss"] for record in records if record["kind"] == "metrics"]


def launcher(name: str, repository: Path) -> list[str]:
    programs = Path(sys.executable).parent
    if name == "torchrun":
        return [str(programs / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "pipeline"]
    starter = [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", "29417"]
    return [*starter, "--module", "pipeline"]


@pytest.mark.parametrize("name", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_launcher_of_two_ranks_trains_like_one_process(
    name: str, launch, config_file: Path, tmp_path: Path, repository: Path
) -> None:
    plain = launch("name=plain", "train.steps=3", world=1)
    command = [*launcher(name, repository), "train", str(config_file), f"name={name}", "train.steps=3"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert plain.wait() == [0], plain.text()
    found = losses(tmp_path / "runs" / name)
    assert len(found) == 3
    assert found == pytest.approx(list(plain.losses().values()), abs=2e-5)


def test_half_a_launcher_is_named() -> None:
    with pytest.raises(ConfigError, match="set RANK, WORLD_SIZE but not LOCAL_RANK"):
        read_world({"RANK": "0", "WORLD_SIZE": "2"})


def test_without_a_launcher_there_is_one_rank() -> None:
    world = read_world({})
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_training_does_not_exit_with_zero(ranks: int, config_file: Path, tmp_path: Path) -> None:
    """So that `train && promote` ends there: 130 from the command, 1 from torchrun, and the journal is closed."""
    mark, log, run_dir = tmp_path / "stopped", tmp_path / "log.txt", tmp_path / "runs" / "run"
    starter = [sys.executable, "-m"] if ranks == 1 else launcher("torchrun", tmp_path)[:-1]
    command = [*starter, "pipeline", "train", str(config_file), "train.steps=5000", "train.checkpoint_every=5000"]
    with log.open("w") as stream:
        environment = os.environ | {"SELORA_STOPPED": str(mark)}
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        wait_for(lambda: (run_dir / "journal.jsonl").is_file() and len(losses(run_dir)) > 2, process, log)
        pids = [one.pid for one in psutil.Process(process.pid).children()] if ranks > 1 else [process.pid]
        os.kill(pids[-1], signal.SIGTERM)
        assert process.wait(240) == (130 if ranks == 1 else 1), log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines if line["kind"] == "status"] == ["RUNNING", "KILLED"]
    assert mark.exists()
    assert (run_dir / "checkpoints" / "latest").exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
