"""Killed, or with a disk error, at every change of a file: existing files are complete, and the next call works."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import DIED, DONE, REFUSED, Layer, attempt, every_crash
from PIL import Image
from safetensors.torch import load_file

from pipeline.data.shards.index import load_index, pack
from pipeline.data.shards.verify import verify
from pipeline.runs.sweep import read_state, write_state
from pipeline.tracking.journal import Corrupt, Journal, read
from pipeline.training import checkpoint as checkpoints
from pipeline.training.checkpoint import latest_checkpoint, save_checkpoint


def numbered(folder: Path) -> Callable[[str], Path]:
    numbers = itertools.count()
    return lambda name: folder / f"{next(numbers):04d}" / name


def save(run: Path, step: int) -> Path:
    values = {name: torch.full((64,), float(step)) for name in ("a", "b")}
    return save_checkpoint(run, values, values, {"step": step}, keep_last=1)


def half_written(layer: Layer) -> None:
    """Let each tensor file count twice: before it is begun, and with its first half on the disk."""
    whole = checkpoints.save_file

    def save_file(tensors: Any, path: Path) -> None:
        layer.tick()
        whole(tensors, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        layer.tick()
        path.write_bytes(content)

    checkpoints.save_file = save_file


@pytest.mark.parametrize("number", [None, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_a_checkpoint_broken_off_anywhere_leaves_a_whole_one(tmp_path: Path, number: int | None) -> None:
    """The one before or the new one; the same step is then written again, and nothing half is left over."""
    place, run = numbered(tmp_path), tmp_path

    def fresh() -> Path:
        nonlocal run
        run = place("run")
        save(run, 10)
        return run

    def work(layer: Layer) -> None:
        half_written(layer)
        save(run, 20)

    tried = 0
    for left, what in every_crash(work, fresh, (number,)):
        found = latest_checkpoint(left)
        assert found is not None and found.step in (10, 20), what
        for name in ("trainable", "optimizer"):
            tensors = load_file(found.path / f"{name}.safetensors")
            assert all(bool((tensor == found.step).all()) for tensor in tensors.values()), what
        save(left, 20)
        names = sorted(entry.name for entry in (left / "checkpoints").iterdir())
        assert names == ["latest", "step-00000020"], (what, names)
        tried += 1
    assert tried > 25


def test_a_journal_broken_off_anywhere_loses_no_line(tmp_path: Path) -> None:
    """Whatever was written before stays, and after the next attempt each step is there once."""
    place, run = numbered(tmp_path), tmp_path

    def fresh() -> Path:
        nonlocal run
        run = place("run")
        write_steps(run, range(1, 4))
        with (run / "journal.jsonl").open("ab") as file:
            file.write(b'{"seq": 9, "ti')
        return run

    for left, what in every_crash(lambda _: write_steps(run, range(1, 6)), fresh):
        write_steps(left, range(1, 6))
        records = list(read(left / "journal.jsonl"))
        assert not any(isinstance(record, Corrupt) for record in records), what
        steps = [record.data["step"] for record in records if not isinstance(record, Corrupt)]
        assert steps == [1, 2, 3, 4, 5], what


def write_steps(run: Path, steps: range) -> None:
    journal = Journal(run)
    for step in steps:
        journal.metrics(step, {"loss": 1 / step})
    journal.close()


def test_the_state_of_a_trial_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    place, run = numbered(tmp_path), tmp_path

    def fresh() -> Path:
        nonlocal run
        run = place("trial")
        write_state(run, status="training", step=5, total_steps=9)
        return run

    for left, what in every_crash(lambda _: write_state(run, status="finished", step=9), fresh):
        state = read_state(left)
        assert (state.status, state.step) in (("training", 5), ("finished", 9)), what
        assert write_state(left, status="finished", step=9).step == 9
        assert [entry.name for entry in left.iterdir() if "partial" not in entry.name] == ["trial.json"], what


@pytest.mark.slow
def test_packing_broken_off_anywhere_is_no_shard_folder(tmp_path: Path) -> None:
    """An index.json comes last, so it is there with all of its tars or not at all, and --force packs again."""
    for number in range(6):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png")
    place, out = numbered(tmp_path), tmp_path
    wanted = pack(tmp_path / "photos", tmp_path / "calm", samples_per_shard=2).index.digest

    def fresh() -> Path:
        nonlocal out
        out = place("shards")
        out.parent.mkdir()
        return out

    def work(_: Layer) -> None:
        pack(tmp_path / "photos", out, samples_per_shard=2, workers=1)

    for left, what in every_crash(work, fresh, (None, errno.ENOSPC)):
        if (left / "index.json").exists():
            assert verify(left).ok, what
        assert pack(tmp_path / "photos", left, samples_per_shard=2, force=True, workers=1).index.digest == wanted, what
        assert load_index(left).samples == 6
        assert not [entry.name for entry in left.iterdir() if entry.name.endswith(".part")], what


def test_the_layer_fails_where_it_should(tmp_path: Path) -> None:
    """The third change of a file is the last that happens, or the one that is refused."""

    def work(_: Layer) -> None:
        for number in range(5):
            (tmp_path / str(number)).mkdir()

    assert attempt(work, tmp_path, 4) == DIED
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0", "1", "2"]
    (tmp_path / "2").rmdir()
    (tmp_path / "1").rmdir()
    (tmp_path / "0").rmdir()
    assert attempt(work, tmp_path, 2, errno.EIO) == REFUSED
    assert os.listdir(tmp_path) == ["0"]
    (tmp_path / "0").rmdir()
    assert attempt(work, tmp_path, 9) == DONE
