"""The rank of a process from its launcher's variables; clashes are reported."""

from __future__ import annotations

import logging

import pytest

from pipeline.config import ConfigError
from pipeline.training.cluster.distributed import label_logs, read_world

SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
SALLOC_STEP = {
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (SRUN | MEETING, (5, 8, 1, 4)),
        (MPIRUN | MEETING, (3, 4, 1, 2)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, (2, 4, 0, 2)),
        # the deepspeed launcher's name for it
        (TORCHRUN | {"LOCAL_SIZE": "2"}, (2, 4, 0, 2)),
        # torchrun as the one task of each node of an srun step
        (TORCHRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, (2, 4, 0, 4)),
        # a batch script of 8 tasks is one process
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
        # the shell of salloc on 2 nodes, and its interactive step, which is one task
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "4(x2)"},
            (0, 1, 0, 1),
        ),
        (SALLOC_STEP, (0, 1, 0, 1)),
        (SALLOC_STEP | MEETING, (0, 1, 0, 1)),
        (TORCHRUN | SALLOC_STEP, (2, 4, 0, 4)),
        ({}, (0, 1, 0, 1)),
    ],
)
def test_the_launcher_in_use_is_found(env: dict[str, str], expected: tuple[int, ...]) -> None:
    world = read_world(env)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == expected
    assert world.host


def test_srun_without_a_meeting_place_is_told_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="srun started 8 tasks, but MASTER_ADDR and MASTER_PORT"):
        read_world(SRUN)


def test_torchrun_in_every_task_of_a_node_is_refused() -> None:
    env = TORCHRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    with pytest.raises(ConfigError, match="srun started 8 tasks on 2 nodes and each of them torchrun"):
        read_world(env)


def test_a_rank_beyond_its_world_is_two_launchers_at_once() -> None:
    with pytest.raises(ConfigError, match="RANK=4 is not below WORLD_SIZE=2"):
        read_world({"RANK": "4", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_every_log_line_says_run_rank_and_host_and_says_it_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a library has called logging.basicConfig, as deepspeed and alembic do."""
    root = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    monkeypatch.setattr(logging.getLogger("selora"), "propagate", True)
    world = read_world(TORCHRUN)
    for run in ("first", "trial"):
        label_logs(world, run)
    logging.getLogger("selora.training").warning("disk is slow")
    logging.getLogger("selora").handlers.clear()  # its stream ends with this test
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("WARNING ")[2] for line in lines] == [f"[trial rank 2 on {world.host}] disk is slow"]
