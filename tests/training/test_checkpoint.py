"""Checkpoints on disk: always complete, and always the right number of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ConfigError
from pipeline.training import checkpoint as module
from pipeline.training.checkpoint import Writer, latest_checkpoint, save_checkpoint


def save(run_dir: Path, step: int, keep_last: int = 2) -> Path:
    tensors = {"a": torch.full((3,), float(step))}
    return save_checkpoint(run_dir, tensors, {"step": torch.tensor([step])}, {"step": step}, keep_last=keep_last)


def test_the_newest_is_found_and_older_ones_are_dropped(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (4, 8, 12):
        save(tmp_path, step)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 12
    assert load_file(newest.path / "trainable.safetensors")["a"].tolist() == [12.0] * 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000008",
        "step-00000012",
    ]


def test_a_write_that_breaks_leaves_the_last_one_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 4)

    def broken(tensors: dict, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "save_file", broken)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 8)
    monkeypatch.undo()
    kept = latest_checkpoint(tmp_path)
    assert kept is not None
    assert kept.step == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 4)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4


def test_a_pointer_to_nothing_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    (folder / "state.json").unlink()
    with pytest.raises(ConfigError, match="step-00000004, which is missing or incomplete"):
        latest_checkpoint(tmp_path)


def test_a_writer_works_while_others_go_on(tmp_path: Path) -> None:
    """A slow write neither delays its caller nor is overtaken by the next one."""
    writer, begun, go_on, order = Writer(), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        assert go_on.wait(30)
        order.append("first")

    writer.start(slow)
    assert begun.wait(30)
    writer.check()  # returns while the write goes on
    assert not order
    threading.Timer(0.05, go_on.set).start()
    writer.start(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]
    writer.close()


def test_a_failed_write_is_raised_once_and_by_the_next_call(tmp_path: Path) -> None:
    writer = Writer()

    def broken() -> None:
        raise ConfigError("no space")

    writer.start(broken)
    with pytest.raises(ConfigError, match="no space"):
        writer.wait()
    writer.wait()
    writer.start(broken)
    with pytest.raises(ConfigError, match="no space"):
        writer.start(lambda: None)
    writer.close()


def test_closing_lets_a_begun_write_end(tmp_path: Path) -> None:
    writer = Writer()
    writer.start(lambda: (time.sleep(0.05), save(tmp_path, 4)))
    writer.close()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4
