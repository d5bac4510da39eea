"""The checks of two ranks before a training, and the faults that they find."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from pipeline.config import Config, load_config


def _config(tmp_path: Path, **tracking: Any) -> Config:
    import yaml

    path = tmp_path / "config.yaml"
    content = {"out": str(tmp_path / "runs"), "data": {"train": str(tmp_path / "shards")}, "tracking": tracking}
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


def _rank(rank: int, port: int, config: Config, change: dict[str, Any], talk: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    from pipeline.doctor import launch as doctor

    if rank == 1:
        if "torch" in change:
            doctor._version = lambda name: change["torch"] if name == "torch" else "1"
        if "out" in change:
            config = config.model_copy(update={"out": change["out"]})
    elif "torch" in change:
        doctor._version = lambda name: "1"
    found = doctor.check_launch(config, timeout_s=120)
    talk.send({finding.name: (finding.ok, finding.text + finding.todo) for finding in found})


def ask(config: Config, **change: Any) -> list[dict[str, tuple[bool, str]]]:
    port = free_port()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [context.Process(target=_rank, args=(rank, port, config, change, pipes[rank][1])) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        answers = []
        for pipe in pipes:
            assert pipe[0].poll(240)
            answers.append(pipe[0].recv())
        return answers
    finally:
        for process in processes:
            process.join(30)
            process.kill()


@pytest.fixture
def folder(tmp_path: Path, image_folder) -> Path:
    from pipeline.data.shards.index import pack

    pack(image_folder(classes=2, each=2, size=16), tmp_path / "shards", samples_per_shard=2)
    return tmp_path


def test_a_sound_cluster_is_found_sound_by_every_rank(folder: Path) -> None:
    first, second = ask(_config(folder, enabled=False))
    assert {name for name, (ok, _) in first.items() if not ok} <= {"shm"}, first
    assert first["ranks"][1].startswith("2 ranks on ")
    assert "GB/s per rank" in first["collectives"][1]
    assert first["shared path"][1].endswith("is shared and replaces files atomically")
    assert {name: answer for name, answer in second.items() if name != "collectives"} == {
        name: answer for name, answer in first.items() if name != "collectives"
    }
    assert not list((folder / "runs").iterdir())


def test_differences_between_nodes_are_named(folder: Path) -> None:
    """Other versions a path that is not shared and a dead server are named."""
    config = _config(folder, uri="http://127.0.0.1:9")
    first, _ = ask(config, torch="0.9", out=str(folder / "elsewhere"))
    assert first["versions"][0] is False
    assert "torch: 1 on" in first["versions"][1]
    assert "0.9 on" in first["versions"][1]
    assert first["shared path"][0] is False
    assert "is not shared: a file written by rank 0 is missing" in first["shared path"][1]
    assert first["tracking"][0] is False
    assert "Connection refused" in first["tracking"][1]
