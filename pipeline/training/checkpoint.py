"""Checkpoints of the trained parameters, readable by any number of ranks under any ZeRO stage.

    checkpoints/step-00000200/trainable.safetensors   fp32 values of every trained parameter
    checkpoints/step-00000200/optimizer.safetensors   both Adam moments and the step
    checkpoints/step-00000200/state.json              step, base digest, adapter layout, gate map, versions
    checkpoints/latest                                name of the newest complete one

The data position is the step (data/order.py) and every random draw is a function of seed, step and sample, so no
generator state needs saving. Rank 0 writes a checkpoint in a thread, while training continues, into a temporary
directory that is renamed when complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.faults import FULL, number_of
from pipeline.files import sync
from pipeline.runs.run import (
    STATE,
    STATE_FILE,
    StoredCheckpoint,
    checkpoint_dir,
    kept_steps,
    point_to,
)
from pipeline.runs.run import latest_checkpoint as stored_checkpoint


@dataclass(frozen=True)
class Checkpoint(StoredCheckpoint):
    """One complete checkpoint with its tensors."""

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments, {parameter/moment: values}, and `step`."""
        return load_file(self.path / "optimizer.safetensors")


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, or None before the first one."""
    found = stored_checkpoint(run_dir)
    return None if found is None else Checkpoint(found.path, found.state)


def save_checkpoint(
    run_dir: Path, parameters: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any], *, keep_last: int
) -> Path:
    """Write one checkpoint, point `latest` at it, then drop all but the newest `keep_last`. Rank 0 only.

    A full disk raises ConfigError and leaves the earlier checkpoints and `latest` as they were.
    """
    final = checkpoint_dir(run_dir, state["step"])
    partial = final.with_name(f".{final.name}.partial")
    try:
        _remove_partials(final.parent)
        partial.mkdir(parents=True)
        save_file(parameters, partial / "trainable.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        for file in partial.iterdir():
            sync(file)
        STATE.write(partial / STATE_FILE, state)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        point_to(run_dir, state["step"])
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if number_of(error) in FULL:
            raise ConfigError(
                f"no space for the checkpoint of step {state['step']} in {final.parent}: {error}. "
                f"Earlier checkpoints are intact: free space (train.keep_last=1 needs least) and run it again"
            ) from error
        raise
    _drop_old(run_dir, keep_last)
    return final


def _remove_partials(folder: Path) -> None:
    """Remove the incomplete checkpoints of killed attempts, at any step."""
    for left in folder.glob(".*.partial"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


class Writer:
    """Writes checkpoints in a thread, one at a time and in order, so that no rank waits for the disk.

    An exception in a write is raised again by the next call of `start`, `check` or `wait`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Begin a write after the previous one. The tensors that it reads must not change any more."""
        self.wait()
        self._writing = self._pool.submit(write)

    def check(self) -> None:
        """Raise the exception of a finished write, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the current write has finished."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Let the current write end, and ignore its result."""
        self._pool.shutdown()


def _drop_old(run_dir: Path, keep_last: int) -> None:
    for step in kept_steps(run_dir)[:-keep_last]:
        old = checkpoint_dir(run_dir, step)
        # Renamed first, so that a checkpoint half removed by a kill does not count as one and is removed with the next.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
