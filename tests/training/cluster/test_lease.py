"""One job per run: living holders are protected, dead ones are not waited for, and an overtaken one stops writing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from requirements import lacking

from pipeline.config import ConfigError
from pipeline.training.cluster.lease import Lease, LeaseLost, _place

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
    path.write_text(json.dumps(json.loads(path.read_text()) | _place() | {"pid": os.getpid(), "started": 1}))
    start = time.monotonic()
    Lease(tmp_path / "run", renew_s=0.1, stale_s=60.0).release()
    assert time.monotonic() - start < 30


def test_a_silent_job_is_overtaken_and_writes_no_more(tmp_path: Path) -> None:
    """A silent job of another host is overtaken and may not write when it wakes."""
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


def test_a_lease_of_an_older_version_is_watched(tmp_path: Path) -> None:
    """It has no boot and no namespace, so a PID that is free here may live elsewhere: 1.5 s pass before it is taken."""
    pretend_other_host(tmp_path / "run", host=os.uname().nodename, pid=2**22 + 1)
    start = time.monotonic()
    Lease(tmp_path / "run", **QUICK).release()
    assert time.monotonic() - start >= 1.5


@pytest.mark.parametrize("key", ["boot", "processes"])
def test_a_pid_of_another_boot_or_namespace_is_watched(tmp_path: Path, key: str) -> None:
    """The holder's PID is not in use here, which says nothing: its number moves, so the run is its own."""
    path = pretend_other_host(tmp_path / "run", **_place() | {"pid": 2**22 + 1, key: "another"})
    beat = f"""
import json, pathlib, time
path = pathlib.Path({str(path)!r})
for number in range(600):
    partial = path.with_name("partial")
    partial.write_text(json.dumps(json.loads(path.read_text()) | {{"beat": number}}))
    partial.replace(path)
    time.sleep(0.05)
"""
    alive = subprocess.Popen([sys.executable, "-c", beat])
    try:
        with pytest.raises(ConfigError, match="process 4194305 on .* is training this run"):
            Lease(tmp_path / "run", renew_s=0.1, stale_s=20.0)
    finally:
        alive.kill()
        alive.wait()


HOLDER = """
import sys, time
from pathlib import Path
from pipeline.config import ConfigError
from pipeline.training.cluster.lease import Lease
try:
    lease = Lease(Path(sys.argv[1]), renew_s=0.1, stale_s=20.0)
except ConfigError as error:
    sys.exit(str(error))
print("held", flush=True)
sys.stdin.readline()
lease.check()
"""


def test_two_containers_with_one_host_name(tmp_path: Path, repository: Path) -> None:
    """Each has a PID namespace of its own, so the first holder's PID is not found, or is another's, in the second."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", HOLDER]
    if subprocess.run([*command[:5], "true"], capture_output=True, check=False).returncode:
        lacking("namespaces", "no PID namespace can be made here")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command, str(tmp_path / "run")], cwd=repository, **pipes)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = subprocess.run([*command, str(tmp_path / "run")], cwd=repository, text=True, capture_output=True)
        assert second.returncode == 1
        assert "is training this run" in second.stderr
        _, told = first.communicate("\n", timeout=60)
        assert first.returncode == 0, told
    finally:
        first.kill()


def test_a_change_of_the_clock_does_not_kill_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's creation times are wall time: a corrected clock would make every holder a stranger to its own lease."""
    import psutil

    first = Lease(tmp_path / "run", **QUICK)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 12345.0)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    try:
        with pytest.raises(ConfigError, match="is training this run"):
            Lease(tmp_path / "run", **QUICK)
    finally:
        first.release()


def test_a_lost_lease_stops_the_run_at_the_next_step(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "run", renew_s=0.05)
    assert not lease.lost
    pretend_other_host(tmp_path / "run")
    deadline = time.monotonic() + 30
    while not lease.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lease.lost
    lease.release()


def test_who_ends_without_a_mistake_says_one_line(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import pipeline.training.run
    from pipeline.cli import main

    def lose(config: object) -> None:
        raise LeaseLost("runs/x: this run was taken over")

    monkeypatch.setattr(pipeline.training.run, "train", lose)
    assert main(["train", "configs/own_data.yaml"]) == 1
    assert capsys.readouterr().err == "selora train: runs/x: this run was taken over\n"
