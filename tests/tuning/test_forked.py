"""Forked processes: imports are paid once, each dies alone, and each has the environment of its trial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.tuning.cluster import forked
from pipeline.tuning.cluster.forked import run_forked
from pipeline.tuning.cluster.ranks import Slot, in_rank_order, variables_of
from pipeline.tuning.cluster.ray_errors import Died, Failed

PRELOADED = "wave"  # a module of the standard library that nothing else imports


@pytest.fixture(autouse=True)
def light_server(monkeypatch: pytest.MonkeyPatch):
    """A server of this test's own that has imported next to nothing, in place of the session's."""
    own: Any = forkserver.ForkServer()
    for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
        monkeypatch.setattr(forkserver, name, getattr(own, name))
    monkeypatch.setattr(forked, "PRELOAD", (PRELOADED, "pipeline.tuning.cluster.forked", __name__))
    yield own
    own._stop()


def note(file: Path) -> None:
    """Write what this process is like."""
    found = [os.environ.get("SELORA_MARK"), "HOME" in os.environ, str(Path.cwd()), PRELOADED in sys.modules]
    file.write_text(repr([*found, os.getpid(), os.getppid()]))


def fail(text: str) -> None:
    raise ValueError(text)


def wait_for_ever(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(600)


def test_it_has_the_environment_folder_and_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for mark in ("one", "two"):
        run_forked(note, (tmp_path / mark,), {"SELORA_MARK": mark})
        found.append(eval((tmp_path / mark).read_text()))
    assert [each[:4] for each in found] == [[mark, False, str(tmp_path), True] for mark in ("one", "two")]
    assert found[0][4] != found[1][4]
    assert found[0][5] == found[1][5] != os.getpid()
    assert PRELOADED not in sys.modules


def test_an_error_comes_back_in_a_line() -> None:
    with pytest.raises(Failed, match=r"^ValueError: no such rank$"):
        run_forked(fail, ("no such rank",), dict(os.environ))


def killed(tmp_path: Path, of_server: bool) -> tuple[BaseException, int]:
    """What is raised when a process that is under way, or its server, is killed; and the process."""
    file, caught = tmp_path / "pid", []

    def kill() -> None:
        while not file.exists() or not file.read_text():
            time.sleep(0.02)
        pid = int(file.read_text())
        os.kill(psutil.Process(pid).ppid() if of_server else pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_forked(wait_for_ever, (file,), dict(os.environ))
    except (Died, Failed) as error:
        caught.append(error)
    killer.join()
    return caught[0], int(file.read_text())


def test_a_killed_process_leaves_the_server_alive(tmp_path: Path, light_server: Any) -> None:
    run_forked(note, (tmp_path / "before",), {})
    error, _ = killed(tmp_path, of_server=False)
    assert isinstance(error, Died)
    assert str(error) == "its process was killed, or it ran out of memory (signal 9)"
    run_forked(note, (tmp_path / "after",), {})
    servers = {eval((tmp_path / name).read_text())[5] for name in ("before", "after")}
    assert servers == {light_server._forkserver_pid}


def test_a_dead_server_ends_its_process_and_is_replaced(tmp_path: Path) -> None:
    error, pid = killed(tmp_path, of_server=True)
    assert isinstance(error, Died)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run_forked(note, (tmp_path / "after",), {"SELORA_MARK": "again"})
    assert eval((tmp_path / "after").read_text())[0] == "again"


def test_a_process_ends_with_the_one_that_waits_for_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path[:0] = sys.argv[1:3]; from pathlib import Path\n"
        "from pipeline.tuning.cluster import forked; forked.PRELOAD = ()\n"
        "from tuning_forked import wait_for_ever\n"
        "forked.run_forked(wait_for_ever, (Path(sys.argv[3]),), dict(os.environ))"
    )
    (tmp_path / "tuning_forked.py").write_text(
        "import os, time\ndef wait_for_ever(file):\n    file.write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    file = tmp_path / "pid"
    root = Path(forked.__file__).parents[3]
    waiting = subprocess.Popen([sys.executable, "-c", code, str(root), str(tmp_path), str(file)])
    deadline = time.monotonic() + 120
    while not file.exists() or not file.read_text():
        assert waiting.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    waiting.kill()
    waiting.wait()
    pid = int(file.read_text())
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_the_server_touched_a_card_it_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that stands for torch says that the fork cannot use a card; a process that is not forked lacks it."""
    (tmp_path / "torch.py").write_text("class cuda:\n    _is_in_bad_fork = staticmethod(lambda: True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(forked, "PRELOAD", (PRELOADED, "torch"))
    run_forked(note, (tmp_path / "note",), dict(os.environ))
    found = eval((tmp_path / "note").read_text())
    assert found[3] is False
    assert found[5] == os.getpid()


def test_ranks_of_a_node_follow_each_other_and_share_its_cards() -> None:
    places = [
        Slot("a", "10.0.0.1", 4000, ("1",)),
        Slot("b", "10.0.0.2", 5000, ("0",)),
        Slot("a", "10.0.0.1", 4001, ("0",)),
    ]
    assert in_rank_order(places) == [0, 2, 1]
    found = variables_of([places[position] for position in (0, 2, 1)])
    assert [(each["RANK"], each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) for each in found] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
        ("2", "0", "1"),
    ]
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"], each["WORLD_SIZE"]) for each in found} == {
        ("10.0.0.1", "4000", "3")
    }
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["0,1", "0,1", "0"]
    alone = variables_of([Slot("a", "10.0.0.1", 4000, ())])
    assert "CUDA_VISIBLE_DEVICES" not in alone[0]
