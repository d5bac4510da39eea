from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tracking.journal import JOURNAL, Corrupt, Journal, Record, decode, lock_path, read, tail
from pipeline.tracking.locks import is_held

Start = Callable[..., subprocess.Popen[str]]


def values(path: Path) -> list[tuple[str, int, float]]:
    found = []
    for record in read(path):
        assert isinstance(record, Record)
        if record.kind == "metrics":
            found += [(key, record.data["step"], decode(value)) for key, value in record.data["values"].items()]
    return found


def test_replayed_steps_are_dropped_and_new_ones_kept(open_journal: Callable[[], Journal]) -> None:
    first = open_journal()
    for step in range(10):
        assert first.metrics(step, {"loss": step}) == 1
    first.close()
    second = open_journal()  # resumes from a checkpoint at step 7
    written = [second.metrics(step, {"loss": -step, "fresh": step}) for step in range(7, 12)]
    second.close()
    assert written == [1, 1, 1, 2, 2]
    assert second.replayed == 3
    losses = [(step, value) for key, step, value in values(second.path) if key == "loss"]
    assert losses == [(step, step if step < 10 else -step) for step in range(12)]


def test_sequence_and_time_never_go_back_over_attempts(open_journal: Callable[[], Journal]) -> None:
    paths = set()
    for attempt in range(3):
        journal = open_journal()
        journal.metrics(attempt, {"loss": 1.0})
        journal.write("tags", values={"attempt": str(attempt)})
        journal.close()
        paths.add(journal.path)
    (path,) = paths
    records = [record for record in read(path) if isinstance(record, Record)]
    assert [record.seq for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.time_ms for record in records] == sorted(record.time_ms for record in records)


def test_nan_and_infinities_stay_what_they_are_in_strict_json(open_journal: Callable[[], Journal]) -> None:
    journal = open_journal()
    journal.metrics(0, {"nan": math.nan, "up": math.inf, "down": -math.inf, "one": 1.0})
    journal.close()
    text = journal.path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = {key: value for key, _, value in values(journal.path)}
    assert math.isnan(found.pop("nan"))
    assert found == {"up": math.inf, "down": -math.inf, "one": 1.0}


def test_torn_last_line_is_cut_off_and_the_journal_goes_on(
    open_journal: Callable[[], Journal], caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_journal()
    for step in range(3):
        journal.metrics(step, {"loss": step})
    journal.close()
    os.truncate(journal.path, journal.path.stat().st_size - 7)
    assert [step for _, step, _ in values(journal.path)] == [0, 1]  # a reader meanwhile waits for the rest of the line
    with caplog.at_level(logging.WARNING):
        again = open_journal()
    assert "incomplete last line" in caplog.text
    assert again.metrics(1, {"loss": 9.0}) == 0
    assert again.metrics(2, {"loss": 2.0}) == 1  # its first writing was lost, so this is no replay
    again.close()
    assert [step for _, step, _ in values(journal.path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "broken",
    [
        b"\x00\x00\x00\x00\n",
        b'{"seq":2,"time_ms":5,"kind":"metrics","step":1}\n',
        b"[1]\n",
        b'{"seq":2,"kind":"tags"}\n',
    ],
)
def test_corrupt_line_in_the_middle_is_named_and_the_rest_read(
    open_journal: Callable[[], Journal], caplog: pytest.LogCaptureFixture, broken: bytes
) -> None:
    journal = open_journal()
    for step in range(3):
        journal.metrics(step, {"loss": step})
    journal.close()
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + broken + lines[2])
    records = list(read(journal.path))
    corrupt = [record for record in records if isinstance(record, Corrupt)]
    assert [str(record) for record in corrupt] == [f"{JOURNAL} line 2 cannot be read"]
    assert [record.data["step"] for record in records if isinstance(record, Record)] == [0, 2]
    assert str(next(read(journal.path, len(lines[0])))) == f"{JOURNAL} line 2 cannot be read"
    with caplog.at_level(logging.WARNING):
        open_journal().close()
    assert "line 2" in caplog.text


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_the_tail_has_the_whole_lines_of_the_last_bytes(open_journal: Callable[[], Journal], cut: int) -> None:
    journal = open_journal()
    for step in range(4):
        journal.metrics(step, {"loss": step})
    journal.close()
    *_, third, fourth = lines = journal.path.read_bytes().splitlines(keepends=True)
    size = len(third) + len(fourth) + cut
    assert [record.data["step"] for record in tail(journal.path, size)] == ([2, 3] if cut else [3])
    assert len(list(tail(journal.path, sum(map(len, lines))))) == len(lines)


def test_killed_writer_leaves_whole_lines_and_no_lock(tmp_path: Path, python: Start) -> None:
    code = """
import sys
from pathlib import Path
from pipeline.tracking.journal import Journal
journal = Journal(Path(sys.argv[1]))
for step in range(10**9):
    journal.metrics(step, {"loss": step, "other": 1.5})
    if step == 500:
        print("ready", flush=True)
"""
    writer = python(code, tmp_path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.tracking.journal._LOCK_WAIT_SECONDS", 0.0)
        with pytest.raises(ConfigError, match=f"process {writer.pid}"):
            Journal(tmp_path)
    assert is_held(lock_path(tmp_path / JOURNAL))
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert not is_held(lock_path(tmp_path / JOURNAL))
    journal = Journal(tmp_path)
    last = journal.last_step()
    assert last >= 500
    assert journal.metrics(last + 1, {"loss": 0.0}) == 1
    journal.close()
    steps = [step for key, step, _ in values(journal.path) if key == "loss"]
    assert steps == list(range(last + 2))


def test_a_second_writer_in_a_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: Start
) -> None:
    """Second writer in the same process is refused and looking keeps the lock."""
    journal = Journal(tmp_path)
    with pytest.raises(ConfigError, match="being written by this same process"):
        Journal(tmp_path)
    assert is_held(lock_path(journal.path))
    code = "import sys, pathlib; from pipeline.tracking.locks import is_held; print(is_held(pathlib.Path(sys.argv[1])))"
    assert python(code, lock_path(journal.path)).communicate()[0] == "True\n"  # a POSIX lock is easily lost by looking
    journal.close()
    assert not is_held(lock_path(journal.path))


def test_records_follow_once_a_full_disk_has_room(tmp_path: Path, python: Start) -> None:
    # A file size limit is a full disk that needs no mount: the same partial write, then the same kind of OSError.
    """Full disk is reported once and the records follow when there is room."""
    code = """
import resource, signal, sys
from pathlib import Path
from pipeline.tracking.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(50):
    journal.metrics(step, {"loss": step})
print("size", journal.path.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.metrics(50, {"loss": 50})
journal.close()
"""
    output = python(code, tmp_path).communicate()[0]
    assert output.count("the run continues") == 1
    assert output.count("can be written again") == 1
    size = int(output.split("size ")[1].split()[0])
    assert 800 < size <= 1000
    assert [step for _, step, _ in values(tmp_path / JOURNAL)] == list(range(51))


def test_run_directory_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run directory"):
        Journal(tmp_path / "file" / "run")
