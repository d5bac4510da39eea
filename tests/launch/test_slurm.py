"""The sbatch files on a real Slurm with two nodes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slurm_cluster import NODES, node_tmp

ROOT = Path(__file__).parents[2]
# States of Slurm that a job does not leave.
ENDS = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
FAKE = """#!/usr/bin/env bash
printf '%s ' "$SLURMD_NODENAME" "$@" >>"$RECORD"; echo "stopped=$SELORA_STOPPED hosts=$SELORA_HOSTS" >>"$RECORD"
"""


def submit(environment: dict[str, str], log: Path, script: str, *arguments: str, **more: str) -> str:
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", f"launch/slurm/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def wait(environment: dict[str, str], job: str, log: Path, until: Callable[[], bool], seconds: float) -> None:
    """Wait for `until`, and fail with the job's log as soon as the job has ended without it."""
    deadline = time.monotonic() + seconds
    while not until():
        ended = states(environment, job)
        over = bool(ended) and ended <= ENDS
        # The job may have ended between the two questions, having done what is waited for.
        assert until() or not over, f"job {job} is {', '.join(ended)}: {tail(log)}"
        assert time.monotonic() < deadline, f"job {job} took more than {seconds:g} s: {tail(log)}"
        time.sleep(0.3)


def wait_until_completed(environment: dict[str, str], job: str, log: Path, seconds: float) -> None:
    wait(environment, job, log, lambda: states(environment, job) == {"COMPLETED"}, seconds)


def states(environment: dict[str, str], job: str) -> set[str]:
    """The states of a job, or of the tasks of an array."""
    command = ["scontrol", "show", "job", job, "--oneliner"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    return set(re.findall(r"JobState=(\w+)", shown))


def tail(log: Path) -> str:
    return log.read_text()[-3000:] if log.exists() else "no log; do its nodes see the directory it is written to?"


def logged(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text()


def test_one_torchrun_per_node_is_told_where_the_others_are(
    slurm_environment: dict[str, str], open_folder: Path
) -> None:
    bin_folder, record, log = open_folder / "bin", open_folder / "record.txt", open_folder / "fake.txt"
    bin_folder.mkdir()
    (bin_folder / "torchrun").write_text(FAKE)
    (bin_folder / "torchrun").chmod(0o755)
    settings = {"SELORA_BIN": str(bin_folder), "RECORD": str(record), "RANKS": "4"}
    job = submit(slurm_environment, log, "train.sbatch", "config.yaml", "train.lr=1e-4", **settings)
    wait_until_completed(slurm_environment, job, log, 120)
    lines = sorted(record.read_text().splitlines())
    assert [line.split()[0] for line in lines] == ["n1", "n2"]
    for number, line in enumerate(lines):
        assert (
            f"--nnodes 2 --nproc-per-node 4 --node-rank {number} --master-addr n1 --master-port {20000 + int(job)}"
            in line
        )
        assert line.endswith(f"selora-stopped-{job}-0 hosts=n1,n2")
        assert "selora train config.yaml train.lr=1e-4" in line


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED by 0", "NODE_FAIL"])
def test_a_failed_job_is_noticed_with_its_log(tmp_path: Path, state: str) -> None:
    """A test that waits for success does not wait for its time limit, and shows what the job wrote."""
    log = tmp_path / "log.txt"
    log.write_text("torchrun: No such file or directory")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho JobId=7 JobState={state} Reason=None\n")
    scontrol.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(AssertionError, match=f"job 7 is {state.split()[0]}: torchrun: No such file"):
        wait_until_completed({"PATH": f"{tmp_path}:/usr/bin:/bin"}, "7", log, 600)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_signal_saves_requeues_and_the_run_ends_bit_equal(
    slurm_environment: dict[str, str], open_folder: Path, training: list[str], equal_runs: Callable[[Path, Path], bool]
) -> None:
    settings = {"SELORA_BIN": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}
    log = open_folder / "whole.txt"
    whole = submit(slurm_environment, log, "train.sbatch", *training, "name=whole", **settings)
    wait_until_completed(slurm_environment, whole, log, 900)
    log = open_folder / "cut.txt"
    cut = submit(slurm_environment, log, "train.sbatch", *training, "name=cut", **settings)
    wait(slurm_environment, cut, log, lambda: logged(log, "step 6/"), 900)
    subprocess.run(["scancel", "--signal=TERM", cut], env=slurm_environment, check=True)
    wait(slurm_environment, cut, log, lambda: logged(log, "stopped by a signal and saved: requeue"), 300)
    # Slurm itself lets two minutes pass before it starts a requeued job.
    wait_until_completed(slurm_environment, cut, log, 1200)
    assert logged(log, "attempt 2") and logged(log, "continuing at step")
    assert equal_runs(open_folder / "runs" / "whole", open_folder / "runs" / "cut")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_sweep_is_requeued_and_leaves_no_process(
    slurm_environment: dict[str, str], open_folder: Path, training: list[str]
) -> None:
    """A sweep on Ray inside the allocation is requeued finishes and leaves no process."""
    grid, log = open_folder / "grid.yaml", open_folder / "sweep.txt"
    grid.write_text(
        "grid: {gate.lam: [0.3, 1.0]}\nresources: {workers: 1, cpus_per_worker: 1, gpus_per_worker: 0, eval_cpus: 1}\n"
    )
    config, *settings = training
    settings += ["name=sweep", "train.zero_stage=1", "train.checkpoint_every=16"]
    more = {"SELORA_BIN": str(Path(sys.executable).parent), "CPUS": "2"}
    job = submit(slurm_environment, log, "sweep.sbatch", config, str(grid), *settings, **more)
    run_dirs = open_folder / "runs" / "sweep" / "trials"
    wait(slurm_environment, job, log, lambda: any("train/loss" in text for text in _journals(run_dirs)), 900)
    assert [_left_of_ray(open_folder, node, job) for node in NODES] == [True, True]
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], env=slurm_environment, check=True)
    wait(slurm_environment, job, log, lambda: states(slurm_environment, job) == {"PENDING"}, 300)
    assert not _processes_of(job)
    assert [_left_of_ray(open_folder, node, job) for node in NODES] == [False, False]
    assert any((path / "checkpoints" / "latest").exists() for path in run_dirs.iterdir()), log.read_text()[-3000:]
    wait_until_completed(slurm_environment, job, log, 1500)
    trials = sorted(run_dirs.glob("*/checkpoints/latest"))
    assert [path.read_text().strip() for path in trials] == ["step-00000016"] * 2
    for text in _journals(run_dirs):
        assert text.count('"train/loss"') == 16
    assert any(text.count('"RUNNING"') == 2 for text in _journals(run_dirs))
    assert not _processes_of(job)
    assert [_left_of_ray(open_folder, node, job) for node in NODES] == [False, False]


def _left_of_ray(open_folder: Path, node: str, job: str) -> bool:
    """Whether Ray's directory of a job lies on a node."""
    return (node_tmp(open_folder / "slurm", node) / f"ray-{job}").exists()


def _journals(run_dirs: Path) -> list[str]:
    return [path.read_text() for path in sorted(run_dirs.glob("*/journal.jsonl"))]


PACK = """#!{python}
import functools, sys
import pipeline.cli.originals as originals
originals.list_imagenet_train = functools.partial(originals.list_imagenet_train, images=1040)
from pipeline.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_the_tasks_of_an_array_pack_one_dataset(slurm_environment: dict[str, str], open_folder: Path) -> None:
    """The tasks of an array pack one dataset and the last writes the index."""
    from PIL import Image

    from pipeline.data.originals.imagenet import wnids
    from pipeline.data.shards.index import load_index
    from pipeline.data.shards.verify import verify

    source, bin_folder, out = open_folder / "imagenet", open_folder / "pack-bin", open_folder / "packed"
    for number in range(1040):
        folder = source / wnids()[number % 1000]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(folder / f"{number}.JPEG")
    bin_folder.mkdir()
    (bin_folder / "selora").write_text(PACK.format(python=sys.executable))
    (bin_folder / "selora").chmod(0o755)
    command = ["sbatch", "--parsable", "--array=1-3", f"--output={open_folder}/pack-%a.txt", "launch/slurm/pack.sbatch"]
    command += [str(source), str(out), "--samples-per-shard", "100"]
    environment = slurm_environment | {"SELORA_BIN": str(bin_folder)}
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    first = open_folder / "pack-1.txt"
    wait(slurm_environment, job, first, lambda: (out / "index.json").exists(), 300)
    wait_until_completed(slurm_environment, job, first, 120)
    index = load_index(out)
    assert (index.samples, len(index.shards)) == (1040, 11)
    assert verify(out).ok
    assert not (out / "parts").exists()
    said = [(open_folder / f"pack-{task}.txt").read_text() for task in (1, 2, 3)]
    assert any("1040 samples, 1000 classes in 11 shards" in text for text in said)
    assert [f"{done} of {done} shards" in text for text, done in zip(said, (4, 4, 3), strict=True)] == [True] * 3


def _processes_of(job: str) -> list[str]:
    """Command lines of living processes that were started for a job."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={job}".encode() in environment:
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
