"""Ranks on hosts of their own, with a cable between them that can be pulled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def wait_for(log: Path, text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, f"no {text!r} in:\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


@contextmanager
def two_ranks(two_hosts, tmp_path: Path, timeout: int, sums: int) -> Iterator[list[Path]]:
    logs = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
    with ExitStack() as stack:
        for rank, name in enumerate(two_hosts.names):
            script = (
                f"cd {ROOT}; PYTHONPATH={ROOT} OMP_NUM_THREADS=1 MASTER_ADDR=n1 MASTER_PORT=29533 "
                f"exec {sys.executable} {ROOT}/tests/launch/meet_rank.py {rank} {timeout} {sums}"
            )
            process = two_hosts.start(name, script, logs[rank])
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield logs


def test_a_pulled_cable_is_noticed_and_survived_when_it_comes_back(two_hosts, tmp_path: Path) -> None:
    with two_ranks(two_hosts, tmp_path, timeout=120, sums=100_000) as logs:
        wait_for(logs[0], "sum 3", 180)
        assert "met by eth0" in logs[0].read_text()
        two_hosts.pull_cable("n2")
        wait_for(logs[0], "no sign of life from rank 1 on n2; waiting", 60)
        two_hosts.plug_cable("n2")
        wait_for(logs[0], "rank 1 on n2 is back", 60)
        count = logs[0].read_text().count("sum")
        wait_for(logs[0], f"sum {count + 3}", 60)


@pytest.mark.slow
def test_a_cable_cut_for_good_is_told_on_both_sides_with_the_host(two_hosts, tmp_path: Path) -> None:
    with two_ranks(two_hosts, tmp_path, timeout=20, sums=100_000) as logs:
        wait_for(logs[0], "sum 3", 180)
        two_hosts.pull_cable("n2")
        wait_for(logs[0], "lost: rank 0 on n1: a collective failed", 120)
        assert "rank 1 on n2 has given no sign of life for" in logs[0].read_text()
        two_hosts.plug_cable("n2")  # its words lie on the other side of the cable
        wait_for(logs[1], "lost: rank 1 on n2: a collective failed", 120)


@pytest.mark.slow
def test_hosts_sh_trains_waits_for_the_link_and_ends_bit_equal(
    two_hosts, open_folder: Path, training: list[str], equal_runs: Callable[[Path, Path], bool]
) -> None:
    (open_folder / "hosts.txt").write_text("n1 slots=1\nn2 slots=1\n")

    def start(name: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = open_folder / f"hosts-{name}.txt"
        script = (
            f"cd {ROOT}; export RESTARTS=1 PDSH_SSH_ARGS_APPEND='{two_hosts.ssh_options}' "
            f"SELORA_BIN={Path(sys.executable).parent}; "
            f"launch/hosts.sh {open_folder}/hosts.txt {' '.join(training)} name={name}"
        )
        return two_hosts.start("n1", script, log), log

    process, log = start("link20")
    wait_for(log, "step 5/", 600)
    two_hosts.pull_cable("n2")
    time.sleep(20)
    two_hosts.plug_cable("n2")
    assert process.wait(900) == 0, log.read_text()[-3000:]
    assert "attempt 1 ended" not in log.read_text()

    process, log = start("link")
    wait_for(log, "step 6/", 600)
    two_hosts.pull_cable("n2")
    wait_for(log, "n2 does not answer", 600)
    assert "rank 1 on n2 has given no sign of life for" in log.read_text()
    two_hosts.plug_cable("n2")
    assert process.wait(900) == 0, log.read_text()[-3000:]
    assert "continuing at step 4" in log.read_text()
    assert equal_runs(open_folder / "runs" / "link20", open_folder / "runs" / "link")
