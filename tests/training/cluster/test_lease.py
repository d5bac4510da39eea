"""One job per run: the living are protected, the dead are not waited for, and who was overtaken writes no more."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.training.cluster.lease import Lease, LeaseLost

QUICK = {"renew_s": 0.1, "stale_s": 1.5}


def pretend_other_host(run_dir: Path, **changes: object) -> Path:
    path = run_dir.with_name(f".{run_dir.name}.lease")
    entry = {"holder": "other", "host": "elsewhere", "pid": 1, "started": 0.0, "job": "77", "beat": 3}
    path.write_text(json.dumps(entry | changes))
    return path


def test_a_living_job_keeps_its_run(tmp_path: Path) -> None:
    first = Lease(tmp_path / "run", **QUICK)
    try:
        with pytest.raises(ConfigError, match=r"process \d+ on .* is training this run; wait for it, end it"):
            Lease(tmp_path / "run", **QUICK)
        first.check()
    finally:
        first.release()
    Lease(tmp_path / "run", **QUICK).release()
    assert not list(tmp_path.iterdir())


def test_a_dead_process_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    path = pretend_other_host(tmp_path / "run")
    import os

    entry = json.loads(path.read_text()) | {"host": os.uname().nodename, "pid": os.getpid(), "started": 1.0}
    path.write_text(json.dumps(entry))
    start = time.monotonic()
    Lease(tmp_path / "run", renew_s=0.1, stale_s=60.0).release()
    assert time.monotonic() - start < 30


def test_a_silent_job_of_another_host_is_overtaken_and_may_not_write_when_it_wakes(tmp_path: Path) -> None:
    frozen = Lease(tmp_path / "run", renew_s=600.0, stale_s=1.0)
    path = tmp_path / ".run.lease"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))
    taken = Lease(tmp_path / "run", **QUICK)
    try:
        with pytest.raises(LeaseLost, match=r"taken over by process \d+ on .*writes nothing more"):
            frozen.check()
        frozen.release()
        assert path.exists(), "the overtaken job must not free its successor's run"
    finally:
        taken.release()
    assert not path.exists()


def test_a_lease_cut_in_the_middle_of_writing_is_no_lease(tmp_path: Path) -> None:
    path = tmp_path / ".run.lease"
    path.write_text('{"holder": "x')
    taken = Lease(tmp_path / "run", **QUICK)
    taken.check()
    taken.release()
    assert not path.exists()
