from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.tracking.journal import Record, read
from pipeline.tracking.system import SystemSampler, parse_gpus, sample_machine
from pipeline.tracking.tracker import watch_machine


def test_gpu_lines_become_values_and_unknown_fields_are_left_out() -> None:
    values = parse_gpus("87, 1000, 4000, 250.5\n[N/A], 10, 20, [N/A]\n")
    assert values == pytest.approx({
        "gpu_0_utilization_percentage": 87.0,
        "gpu_0_memory_usage_megabytes": 1048.576,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_power_usage_watts": 250.5,
        "gpu_1_memory_usage_megabytes": 10.48576,
        "gpu_1_memory_usage_percentage": 50.0,
    })  # fmt: skip
    assert parse_gpus("") == {}


def test_samples_go_to_the_journal_of_their_node(tmp_path: Path) -> None:
    """Samples go to the node's own journal and steps go on after a restart."""
    for _ in range(2):
        sampler = SystemSampler(tmp_path, "node:1", 0.05, os.getppid())
        time.sleep(0.4)
        sampler.stop()
    records = [record for record in read(tmp_path / "journal-node_1.jsonl") if isinstance(record, Record)]
    assert [record.data["step"] for record in records] == list(range(len(records)))
    assert len(records) >= 4
    names = {f"system/node_1/{name}" for name in sample_machine(tmp_path)}
    assert names <= records[0].data["values"].keys()


def test_another_node_is_watched_without_a_store(tmp_path: Path) -> None:
    watcher = watch_machine(tmp_path, "far", 0.1)
    path = tmp_path / "journal-far.jsonl"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (path.exists() and len(list(read(path))) >= 3):
        time.sleep(0.1)
    assert watcher.finish(20.0)
    assert len(list(read(path))) >= 3
