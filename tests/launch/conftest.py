"""Clusters on one machine, and a short training with its data on all nodes."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from requirements import lacking

sys.path.insert(0, str(Path(__file__).parent))  # the clusters' modules, which are also programs

STEPS = 16


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A directory that other users may enter: munge runs as its own, and pytest's directories are private."""
    folder = Path(tempfile.mkdtemp(prefix="selora-launch-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_environment(open_folder: Path) -> Iterator[dict[str, str]]:
    import slurm_cluster

    reason = slurm_cluster.why_not()
    if reason:
        lacking("slurm", reason)
    with slurm_cluster.slurm(open_folder / "slurm") as environment:
        yield environment


@pytest.fixture
def two_hosts(tmp_path: Path):
    with _hosts(tmp_path / "net", 2) as found:
        yield found


@pytest.fixture
def three_hosts(tmp_path: Path):
    with _hosts(tmp_path / "net", 3) as found:
        yield found


def _hosts(folder: Path, number: int):
    import net_hosts

    reason = net_hosts.why_not()
    if reason:
        lacking("hosts", reason)
    return net_hosts.hosts(folder, number)


@pytest.fixture(scope="session")
def training(open_folder: Path) -> list[str]:
    """CONFIG and settings of a run of 16 steps, ZeRO-2, a checkpoint every 4; `name` is still to be said."""
    from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack

    unpack(open_folder / "data", "clothing_train.tar.gz")
    return [
        str(asset(FINETUNE)),
        f"model.name=local-dir:{asset(MODEL)}",
        f"data.train={open_folder}/data/clothing_train",
        f"out={open_folder}/runs",
        f"train.steps={STEPS}",
        "train.global_batch_size=32",
        "train.checkpoint_every=4",
        "train.log_every=1",
        "train.zero_stage=2",
        "train.timeout_s=90",
        "tracking.enabled=false",
    ]


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "journal.jsonl").read_text().split("\n")[:-1]  # the last one may be half written while we look
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["values"]["train/loss"] for r in records if "train/loss" in r.get("values", {})}


@pytest.fixture(scope="session")
def losses_of() -> Callable[[Path], dict[int, float]]:
    """{step: loss} by a run's journal."""
    return losses


@pytest.fixture(scope="session")
def equal_runs() -> Callable[[Path, Path], bool]:
    """Whether two finished runs are equal in every loss, every trained value and every moment, to the bit."""
    import torch
    from safetensors.torch import load_file

    def equal(first: Path, second: Path) -> bool:
        assert len(losses(first)) == STEPS
        for name in ("trainable", "optimizer"):
            ours, theirs = (
                load_file(run / f"checkpoints/step-{STEPS:08d}/{name}.safetensors") for run in (first, second)
            )
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
                return False
        return losses(first) == losses(second)

    return equal
