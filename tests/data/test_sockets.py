"""Loader processes hand over tensors by sockets, whose addresses a long TMPDIR must not make too long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import tempfile, torch
from multiprocessing import util
from pipeline.data.batches import Batches

def make(ids):
    return torch.tensor(ids)

if __name__ == "__main__":
    print([int(batch.sum()) for batch in Batches(make, [[1, 2], [3], [4], [5]], workers=2)])
    print(util.get_temp_dir())
    print(tempfile.gettempdir())
"""


@pytest.mark.parametrize("length", [20, 90])
def test_workers_pass_tensors_whatever_the_length_of_tmpdir(tmp_path: Path, repository: Path, length: int) -> None:
    long = tmp_path / ("t" * length)
    long.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"TMPDIR": str(long), "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    values, sockets, temporary = done.stdout.splitlines()
    assert values == "[3, 3, 4, 5]"
    assert temporary == str(long), "only the sockets move"
    assert len(sockets) + len("/listener-01234567") <= 107
    assert not Path(sockets).exists(), "the directory ends with its process"
