"""The command under the launchers that users have: the same losses under each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.training.cluster.distributed import read_world


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [record["values"]["train/loss"] for record in records if record["kind"] == "metrics"]


def launcher(name: str, repository: Path) -> list[str]:
    programs = Path(sys.executable).parent
    if name == "torchrun":
        return [str(programs / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "pipeline"]
    starter = [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", "29417"]
    return [*starter, "--module", "pipeline"] if name == "deepspeed" else [sys.executable, "-m", "pipeline"]


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_a_launcher_of_two_ranks_trains_like_one_process(
    name: str, config_file: Path, tmp_path: Path, repository: Path
) -> None:
    common = ["train", str(config_file), "train.steps=3"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = {}
    for kind in ("plain", name):
        command = [*launcher(kind, repository), *common, f"name={kind}"]
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        found[kind] = losses(tmp_path / "runs" / kind)
    assert len(found[name]) == 3
    assert found[name] == pytest.approx(found["plain"], abs=2e-5)


def test_half_a_launcher_is_named() -> None:
    with pytest.raises(ConfigError, match="set RANK, WORLD_SIZE but not LOCAL_RANK"):
        read_world({"RANK": "0", "WORLD_SIZE": "2"})


def test_without_a_launcher_there_is_one_rank() -> None:
    world = read_world({})
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
