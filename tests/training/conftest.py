"""Real training runs on a tiny CLIP: ranks are processes of a fork server that has the heavy imports done."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ports import free_port

SMALL = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def _run_rank(
    rank: int, world: int, port: int, config: Path, overrides: list[str], errors: Path, cache: str | None
) -> None:
    """What a launcher and `selora train` do, in a process that need not import torch again."""
    # Loading processes are forked, as those of a rank that a launcher starts: another fork server costs seconds of CPU.
    multiprocessing.set_start_method("fork", force=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if cache is not None:  # the fork server has the environment of its own start
        os.environ["SELORA_CACHE"] = cache
    from pipeline.config import ConfigError, load_config
    from pipeline.training.run import train

    said = io.StringIO()
    sys.stderr = said
    try:
        train(load_config(config, overrides))
        code = 0
    except ConfigError as error:
        said.write(f"ConfigError: {error}\n")
        code = 2
    except BaseException:  # noqa: BLE001 - the parent reads what happened
        said.write(traceback.format_exc())
        code = 1
    errors.write_text(said.getvalue())
    # Like a killed launcher's child: a peer that is gone must not hold up the exit.
    os._exit(code)


@dataclass
class Run:
    """One call of `selora train` over some ranks."""

    processes: list[BaseProcess]
    said: list[Path]
    directory: Path

    def wait(self, timeout: float = 240) -> list[int | None]:
        """Exit codes of the ranks."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
        return [process.exitcode for process in self.processes]

    def signal_at(self, step: int, number: int, rank: int, timeout: float = 240) -> None:
        """Send a signal to one rank once the journal holds the losses of `step`."""
        deadline = time.monotonic() + timeout
        while max(self.losses(), default=-1) < step:
            assert time.monotonic() < deadline, self.text()
            assert any(process.is_alive() for process in self.processes), self.text()
            time.sleep(0.005)
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def losses(self) -> dict[int, float]:
        """step -> loss, as the journal has it."""
        journal = self.directory / "journal.jsonl"
        found = {}
        for line in journal.read_text().splitlines() if journal.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line may be half written while we look
            if record["kind"] == "metrics" and "train/loss" in record["values"]:
                found[record["step"]] = record["values"]["train/loss"]
        return found

    def text(self) -> str:
        """What all ranks said on stderr."""
        return "\n".join(path.read_text() for path in self.said if path.exists())


Launch = Callable[..., Run]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """96 images of 4 classes in 6 shards."""
    from pipeline.data.shards.index import pack

    out = tmp_path_factory.mktemp("shards") / "train"
    pack(image_folder(classes=4, each=24, size=40), out, samples_per_shard=16)
    return out


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP whose tokens are given as numbers, so that few of them are enough."""
    folder = tmp_path_factory.mktemp("small_clip")
    (folder / "open_clip_config.json").write_text(json.dumps(SMALL))
    return str(folder)


@pytest.fixture
def config_file(tmp_path: Path, shards: Path, tiny_clip: Path) -> Path:
    """Twelve steps of 16: one epoch is six steps, checkpoints come every four."""
    return _write_config(tmp_path, shards, tiny_clip)


def _write_config(folder: Path, shards: Path, tiny_clip: Path) -> Path:
    import yaml

    content = {
        "out": str(folder / "runs"),
        "model": {"name": f"local-dir:{tiny_clip}"},
        "adapter": {"kind": "lora", "rank": 4},
        "gate": {"lr": 0.002},
        "train": {
            "lr": 0.001,
            "warmup_steps": 2,
            "steps": 12,
            "global_batch_size": 16,
            "log_every": 1,
            "gates_every": 4,
            "checkpoint_every": 4,
        },
        "data": {
            "train": str(shards),
            "streams": 8,
            "shuffle_window": 8,
            "workers": 0,
            "templates": ["a {c}", "the {c}", "{c}"],
        },
        "tracking": {"enabled": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def launch(config_file: Path, fork_server: Any) -> Iterator[Launch]:
    """launch("key=value", .., world=2) starts `selora train` on that many ranks and returns at once."""
    started: list[Run] = []

    def start(*overrides: str, world: int = 2, config: Path = config_file) -> Run:
        started.append(_start(fork_server, config, list(overrides), world))
        return started[-1]

    yield start
    for run in started:
        for process in run.processes:
            if process.is_alive():
                process.kill()
                process.join()


def _start(fork_server: Any, config: Path, overrides: list[str], world: int) -> Run:
    from pipeline.config import load_config

    settings, port = load_config(config, overrides), free_port()
    folder = Path(tempfile.mkdtemp(dir=config.parent, prefix="stderr-"))
    said = [folder / f"{rank}.txt" for rank in range(world)]
    processes = [
        fork_server.Process(
            target=_run_rank, args=(rank, world, port, config, overrides, said[rank], os.environ.get("SELORA_CACHE"))
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return Run(processes, said, Path(settings.out) / settings.name)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_clip: Path, fork_server: Any) -> Run:
    """The run of config_file on two ranks, from its first step to its last: what a continued run has to equal."""
    config = _write_config(tmp_path_factory.mktemp("undisturbed"), shards, tiny_clip)
    run = _start(fork_server, config, ["name=undisturbed"], world=2)
    assert run.wait() == [0, 0], run.text()
    return run


def corrupt_jpeg(path: Path) -> None:
    """Cut the entropy-coded half of an image off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])


def noise_image(path: Path, seed: int, size: int = 32) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


KILL = signal.SIGKILL
