"""Ranks on separate hosts, with a cable between them that can be pulled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Started(NamedTuple):
    """A process on a host and the file that it writes to."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until the log has `text`, as long as the process may still write it."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            content = self.log.read_text() if self.log.exists() else ""
            if text in content:
                return
            assert not ended, f"ended with {self.process.returncode} and without {text!r}:\n{content[-3000:]}"
            assert time.monotonic() < deadline, f"no {text!r} in:\n{content[-3000:]}"
            time.sleep(0.1)


def test_a_process_that_failed_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(["sh", "-c", "echo no such file; exit 3"], stdout=out)
    with pytest.raises(AssertionError, match="ended with 3 and without 'step 5':\n *no such file"):
        Started(process, log).wait_for("step 5", 600)


@contextmanager
def two_ranks(two_hosts, tmp_path: Path, timeout: int, sums: int) -> Iterator[list[Started]]:
    logs = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
    started = []
    with ExitStack() as stack:
        for rank, name in enumerate(two_hosts.names):
            script = (
                f"cd {ROOT}; PYTHONPATH={ROOT} OMP_NUM_THREADS=1 MASTER_ADDR=n1 MASTER_PORT=29533 "
                f"exec {sys.executable} {ROOT}/tests/launch/meet_rank.py {rank} {timeout} {sums}"
            )
            process = two_hosts.start(name, script, logs[rank])
            started.append(Started(process, logs[rank]))
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield started


def test_a_pulled_cable_is_noticed_and_survived(two_hosts, tmp_path: Path) -> None:
    """A pulled cable is noticed and survived when it comes back."""
    with two_ranks(two_hosts, tmp_path, timeout=120, sums=100_000) as (first, _):
        first.wait_for("sum 3", 180)
        assert "met by eth0" in first.log.read_text()
        two_hosts.pull_cable("n2")
        first.wait_for("no sign of life from rank 1 on n2; waiting", 60)
        two_hosts.plug_cable("n2")
        first.wait_for("rank 1 on n2 is back", 60)
        count = first.log.read_text().count("sum")
        first.wait_for(f"sum {count + 3}", 60)


@pytest.mark.slow
def test_a_cut_cable_is_reported_on_both_sides(two_hosts, tmp_path: Path) -> None:
    """A cable cut for good is reported on both sides with the host."""
    with two_ranks(two_hosts, tmp_path, timeout=20, sums=100_000) as (first, second):
        first.wait_for("sum 3", 180)
        two_hosts.pull_cable("n2")
        first.wait_for("lost: rank 0 on n1: a collective failed", 120)
        assert "rank 1 on n2 has given no sign of life for" in first.log.read_text()
        two_hosts.plug_cable("n2")  # its log is on the other side of the cable
        second.wait_for("lost: rank 1 on n2: a collective failed", 120)


@pytest.mark.slow
def test_hosts_sh_trains_waits_for_the_link_and_ends_bit_equal(
    two_hosts, open_folder: Path, training: list[str], equal_runs: Callable[[Path, Path], bool]
) -> None:
    (open_folder / "hosts.txt").write_text("n1 slots=1\nn2 slots=1\n")

    def start(name: str) -> Started:
        log = open_folder / f"hosts-{name}.txt"
        script = (
            f"cd {ROOT}; export RESTARTS=1 PDSH_SSH_ARGS_APPEND='{two_hosts.ssh_options}' "
            f"SELORA_BIN={Path(sys.executable).parent}; "
            f"launch/hosts.sh {open_folder}/hosts.txt {' '.join(training)} name={name}"
        )
        return Started(two_hosts.start("n1", script, log), log)

    whole = start("link20")
    whole.wait_for("step 5/", 600)
    two_hosts.pull_cable("n2")
    time.sleep(20)
    two_hosts.plug_cable("n2")
    assert whole.process.wait(900) == 0, whole.log.read_text()[-3000:]
    assert "attempt 1 ended" not in whole.log.read_text()

    cut = start("link")
    cut.wait_for("step 6/", 600)
    two_hosts.pull_cable("n2")
    cut.wait_for("n2 does not answer", 600)
    assert "rank 1 on n2 has given no sign of life for" in cut.log.read_text()
    two_hosts.plug_cable("n2")
    assert cut.process.wait(900) == 0, cut.log.read_text()[-3000:]
    assert "continuing at step 4" in cut.log.read_text()
    assert equal_runs(open_folder / "runs" / "link20", open_folder / "runs" / "link")
