"""The harness finds its faults: a command that does not survive, another result, a process left over."""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import chaos
import pytest
from stories import STORIES, Story


class _Server:
    """Processes without the product's imports: argv is a Python text."""

    def Process(self, target: object, args: tuple[list[str], Path, str]) -> BaseProcess:  # noqa: N802
        return multiprocessing.get_context("fork").Process(target=_run, args=args)


def _run(argv: list[str], log: Path, mark: str) -> None:
    import os
    import subprocess

    os.setsid()
    os.environ[chaos.MARK] = mark
    os._exit(subprocess.run([sys.executable, "-c", argv[0]], check=False).returncode)


def story(text: str, result: object = None) -> Story:
    """A command that is a Python text in which BOX is the box."""
    return Story(
        "any",
        (),
        lambda _, box: [text.replace("BOX", repr(str(box)))],
        lambda box: ["half"] if (box / "half").exists() else [],
        lambda box: {"got": (box / "out").read_text() if result is None else result},
    )


def found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> chaos.Tally:
    monkeypatch.setattr(chaos, "_ALONE_S", 0.5)
    monkeypatch.setattr(chaos, "_AGAIN", 2)
    # Always at once: the command is surely in its sleep.
    monkeypatch.setattr(chaos, "FAULTS", ("kill",))
    monkeypatch.setattr(chaos, "_mount", lambda folder: False)
    until = time.monotonic() + 0.5
    return chaos.disturb(story(text), tmp_path, tmp_path / "boxes", _Server(), until, 0)


def test_a_command_that_survives_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = found("import time; time.sleep(0.3); open(BOX + '/out', 'w').write('x')", tmp_path, monkeypatch)
    assert tally.tries >= 1
    assert tally.faults == []
    assert not [path for path in (tmp_path / "boxes").iterdir() if path.is_dir() and "calm" not in path.name]


def test_another_result_is_found_with_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import time; open(BOX + '/out', 'a').write('x'); time.sleep(0.3)"
    tally = found(text, tmp_path, monkeypatch)
    assert any(fault.startswith("seed 0/any/") and "another result: got x" in fault for fault in tally.faults)


def test_a_command_that_cannot_go_on_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses what its own killed attempt has left."""
    text = "import os, time; os.mkdir(BOX + '/d'); time.sleep(0.3); open(BOX + '/out', 'w').write('x')"
    tally = found(text, tmp_path, monkeypatch)
    assert any("does not end well any more: exit codes [1, 1" in fault for fault in tally.faults)


def test_a_process_that_is_left_over_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import subprocess, sys; open(BOX + '/out', 'w').write('x');"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)"
    )
    tally = found(text, tmp_path, monkeypatch)
    assert any("still runs: " in fault for fault in tally.faults)


def test_what_is_half_written_is_found_after_the_blow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import os, time; open(BOX + '/half', 'w'); time.sleep(1.5); os.remove(BOX + '/half');"
        "open(BOX + '/out', 'w').write('x')"
    )
    monkeypatch.setattr(random.Random, "uniform", lambda self, low, high: 1.0)
    assert any("kill: half" in fault for fault in found(text, tmp_path, monkeypatch).faults)


def test_the_table_has_a_row_for_each_command() -> None:
    tally = chaos.Tally(tries=3, faults=["seed 1/x/2: half"])
    tally.blows.update({"kill": 2, "stop shipper": 1})
    text = chaos.table({"train": tally, "pack": chaos.Tally(tries=1)}, 1)
    assert "| command | tries | kill | stop shipper | blows | faults found |" in text
    assert "| train | 3 | 2 | 1 | 3 | 1 |" in text and "| pack | 1 | 0 | 0 | 0 | 0 |" in text
    assert len({one.name for one in STORIES}) == len(STORIES) == 7


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_survives_a_blow(tmp_path: Path) -> None:
    assert chaos.main(["--minutes", "0", "--seed", "11", "--out", str(tmp_path)]) == 0
