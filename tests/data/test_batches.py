"""The worker processes: they survive the launcher's signals, and end with the trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.config import ConfigError
from pipeline.data.batches import Batches
from pipeline.faults import lost_worker

SCRIPT = """
import os, signal, sys, time
import psutil
from pipeline.data.batches import Batches

def make(positions):
    time.sleep(0.02)
    return sum(positions)

plan = [[i, i] for i in range(60)]
stream = iter(Batches(make, plan, workers=2, prefetch=2))
found = [next(stream)]
workers = psutil.Process().children()
assert len(workers) == 2, workers
for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
    for worker in workers:
        os.kill(worker.pid, number)
found += stream
assert found == [2 * i for i in range(60)], found
unread = iter(Batches(make, plan, workers=2))
next(unread)
workers = psutil.Process().children()
os.kill(workers[0].pid, signal.SIGSTOP)
print(time.time(), *[worker.pid for worker in workers])
"""


def test_workers_outlive_signals_but_not_the_trainer() -> None:
    """Workers outlive signals and end with a trainer that stops in the middle, also one that is stuck."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", SCRIPT]  # torch warns of workers on a single core
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    stopped, *pids = done.stdout.split()
    assert len(pids) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    # A worker that was told to leave by SIGTERM alone would take its minute.
    assert ended - float(stopped) < 50


SMALL_SHM = """
import torch
from pipeline.data.batches import Batches
from pipeline.faults import lost_worker

def full(storage):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")

torch.UntypedStorage._share_fd_cpu_ = full
try:
    list(Batches(torch.tensor, [[1, 2], [3]], workers=1))
except RuntimeError as error:
    print(lost_worker(error))
"""


def test_a_small_dev_shm_ends_in_a_line_and_not_in_a_wait() -> None:
    """A worker cannot hand over its batch: one line says why, the trainer learns of it and ends."""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", SMALL_SHM], cwd=root, capture_output=True, text=True, timeout=100)
    assert done.stdout == "a loader worker ended, see its line above; the same command continues\n"
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"loader worker \d+: /dev/shm has no room for a batch: .* data.workers=0, --workers 0", line)


@pytest.mark.parametrize(
    ("signal_name", "expected"),
    [("Bus error", "/dev/shm has no room for a batch"), ("Killed", "was killed (Killed): where the machine ran out")],
)
def test_a_killed_loader_worker_is_told_in_a_line(signal_name: str, expected: str) -> None:
    """As torch says it; any other error is none of a worker's."""
    told = lost_worker(RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {signal_name}. "))
    assert told is not None and expected in told
    assert lost_worker(RuntimeError("size mismatch")) is None


KILLED = """
import time
import psutil
from pipeline.data.batches import Batches

def make(positions):
    return sum(positions)

if __name__ == "__main__":
    stream = iter(Batches(make, [[i] for i in range(60)], workers=1, start_method={method!r}))
    next(stream)
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_no_worker_outlives_a_trainer_that_was_killed(tmp_path: Path, method: str) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(KILLED.format(method=method))
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert pids
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while (left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


CUT_SHORT = """
import sys, time
from pathlib import Path
from pipeline.data.batches import Batches

class Work:
    def __init__(self):
        self.parts = Arrived(), bytes(10**7)
    def __call__(self, positions):
        return 0

class Arrived:
    def __getstate__(self):
        return {"place": sys.argv[1]}
    def __setstate__(self, state):  # in the worker, while the trainer still sends the rest
        Path(state["place"]).touch()
        time.sleep(2)

if __name__ == "__main__":
    next(iter(Batches(Work(), [[1]], workers=1, start_method="forkserver")))
"""


def test_a_worker_that_never_got_its_work_ends_quietly(tmp_path: Path) -> None:
    script, place, log = tmp_path / "trainer.py", tmp_path / "arrived", tmp_path / "log"
    script.write_text(CUT_SHORT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "SELORA_TEST_CUT": str(tmp_path)}
    with log.open("w") as file:
        trainer = subprocess.Popen([sys.executable, script, place], stdout=file, stderr=file, env=environment)
    deadline = time.monotonic() + 60
    while not place.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert place.exists(), log.read_text()
    trainer.kill()
    trainer.wait()
    while _started_with("SELORA_TEST_CUT", str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _started_with("SELORA_TEST_CUT", str(tmp_path))
    assert "Traceback" not in log.read_text()


def _started_with(name: str, value: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process.pid)
    return found


def double(positions: Sequence[int]) -> list[int]:
    if 7 in positions:
        raise ConfigError("seven is damaged")
    if 9 in positions:
        raise ZeroDivisionError("a mistake of ours")
    return [2 * position for position in positions]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_follow_the_plan_and_can_be_read_again(workers: int) -> None:
    """Batches come in the order of the plan and can be read again."""
    made = Batches(double, [[1], [2, 3], [], [4]], workers=workers)
    assert len(made) == 4
    assert list(made) == list(made) == [[2], [4, 6], [], [8]]
    assert list(Batches(double, [], workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_only_our_own_mistakes_have_a_traceback(workers: int) -> None:
    """Faults of the data are reported plainly and mistakes of ours with a traceback."""
    stream = iter(Batches(double, [[1], [7]], workers=workers))
    assert next(stream) == [2]
    with pytest.raises(ConfigError) as caught:
        next(stream)
    assert str(caught.value) == "seven is damaged"
    with pytest.raises(ZeroDivisionError):
        list(Batches(double, [[9]], workers=workers))
