"""Checkpoints of what trains, readable by any number of ranks under any ZeRO stage.

    checkpoints/step-00000200/trainable.safetensors   fp32 values of every trained parameter
    checkpoints/step-00000200/optimizer.safetensors   both Adam moments and the step
    checkpoints/step-00000200/state.json              step, base digest, adapter layout, gate map, versions
    checkpoints/latest                                name of the newest complete one

The data position is the step (data/order.py) and every random draw is a function of seed, step and sample, so no
generator state needs saving. Written by rank 0 into a temporary directory that is renamed when complete.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.faults import FULL, number_of


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: its directory and what its state.json said when it was found."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def moments(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, or None before the first one."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    file = path / "state.json"
    if not file.exists():
        raise ConfigError(f"{pointer} names {path.name}, which is missing or incomplete: restore it or remove `latest`")
    return Checkpoint(path, json.loads(file.read_text(encoding="utf-8")))


def save_checkpoint(
    run_dir: Path, parameters: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any], *, keep_last: int
) -> Path:
    """Write one checkpoint, point `latest` at it, then drop all but the newest `keep_last`. Rank 0 only.

    A full disk raises ConfigError and leaves the earlier checkpoints and `latest` as they were.
    """
    root = run_dir / "checkpoints"
    final = root / f"step-{state['step']:08d}"
    partial = root / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(parameters, partial / "trainable.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _point(root / "latest", final.name)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if number_of(error) in FULL:
            raise ConfigError(
                f"no space for the checkpoint of step {state['step']} in {root}: {error}. "
                f"Earlier checkpoints are intact: free space (train.keep_last=1 needs least) and run it again"
            ) from error
        raise
    _drop_old(root, keep_last)
    return final


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(pointer)


def _drop_old(root: Path, keep_last: int) -> None:
    complete = sorted(path for path in root.glob("step-*") if (path / "state.json").exists())
    for path in complete[:-keep_last]:
        shutil.rmtree(path)
