"""python tests/chaos/chaos.py [--minutes M] [--blows N] [--seed S] [--commands NAME ..]: commands disturbed.

Each try runs one command in a box of its own, strikes it one to three times at moments drawn from the seed, gives the
command again until it ends well, and compares what came out with an undisturbed run, bit by bit. The last line says how
many tries found a fault; a table goes to --out, with the seed of every try that did.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, where it is not installed

import psutil
from stories import STORIES, Story, base_of

ROOT = Path(__file__).parents[2]
MARK = "SELORA_CHAOS"  # in the environment of every process that a try starts
FAULTS = ("kill", "kill one", "kill one", "stop", "terminate", "interrupt", "full disk")
# Processes of a command by what is in their command lines; a child of the command without any of them loads its data.
ROLES = (
    ("shipper", "shipper"),
    ("raylet", "raylet"),
    ("gcs_server", "gcs"),
    ("ray::", "ray worker"),
    ("default_worker.py", "ray worker"),
    ("ray/", "ray helper"),
)
DISK = "192m"
_ALONE_S = 90.0  # how long a process may outlive its command: the shipper delivers what is left
_HUNG_S = 900.0
_AGAIN = 6  # calls of a disturbed command until it must have ended well


@dataclass
class Tally:
    """What a command went through."""

    tries: int = 0
    blows: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def _command(argv: list[str], log: Path, mark: str) -> None:
    """A command in a session of its own, in a process that has the slow imports behind it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    os.environ[MARK] = mark
    sys.argv = ["selora", *argv]
    with log.open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    from pipeline.__main__ import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    sys.stdout.flush()
    os._exit(code)


class Box:
    """One try: the command's directory, its processes, and what they printed."""

    def __init__(self, story: Story, base: Path, folder: Path, server: Any) -> None:
        self.story, self.base, self.folder, self._server = story, base, folder, server
        self.mark, self.log = f"{os.getpid()}-{folder.name}", folder.with_suffix(".log")
        self._sessions: set[int] = set()
        self._heard = 0
        folder.mkdir(parents=True)
        self.mounted = _mount(folder)
        for name in story.inputs:
            (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, folder / name)

    def start(self, argv: list[str] | None = None) -> Any:
        argv = argv or self.story.argv(self.base, self.folder)
        process = self._server.Process(target=_command, args=(argv, self.log, self.mark))
        process.start()
        self._sessions.add(process.pid)
        return process

    def said(self) -> str:
        """What the last call printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        said, self._heard = text[self._heard :], len(text)
        return said

    def processes(self) -> list[psutil.Process]:
        """All that this try has started and that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = os.getsid(process.pid) in self._sessions or process.environ().get(MARK) == self.mark
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def role(self, process: psutil.Process, command: Any) -> str:
        """What a process does for the command."""
        if process.pid == command.pid:
            return "command"
        line = " ".join(process.cmdline())
        named = next((role for mark, role in ROLES if mark in line), None)
        return named or ("loader worker" if process.ppid() == command.pid else "other")

    def fill(self, seconds: float) -> None:
        """No byte is left on the box's disk for a while; only where it has a disk of its own."""
        filler = self.folder / ".filler"
        try:
            with filler.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            time.sleep(seconds)
        finally:
            filler.unlink(missing_ok=True)

    def close(self, keep: bool) -> None:
        """Give its disk back; what is on it is kept in NAME.left where there is something to look at."""
        if keep:
            shutil.copytree(self.folder, self.folder.with_suffix(".left"), symlinks=True)
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)
        shutil.rmtree(self.folder)

    def end(self) -> list[str]:
        """Faults of what is left over; ends it."""
        deadline = time.monotonic() + _ALONE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = [" ".join(process.cmdline()[:6]) for process in left]
        for process in left:
            process.kill()
        return [f"still runs: {name}" for name in names]


def _mount(folder: Path) -> bool:
    """Give a box a disk of its own, which can be filled; where that is not allowed, its disk is never full."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True)
    return made.returncode == 0


def strike(box: Box, process: Any, fault: str, draw: random.Random) -> str:
    """One blow; `process` is the command's own. Returns what was done, '' where it had ended before."""
    numbers = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
    try:
        if fault in numbers:
            os.kill(process.pid, numbers[fault])
            return fault
        if fault == "full disk":
            if not box.mounted:
                return ""
            box.fill(draw.uniform(0.5, 4.0))
            return fault
        role, victim = _victim(box, process, draw)
        if fault == "kill one":
            victim.kill()
            return f"kill {role}" if role != "command" else "kill"
        victim.suspend()
        time.sleep(draw.uniform(0.5, 3.0))
        victim.resume()
        return f"stop {role}"
    except (psutil.Error, OSError):
        return ""  # it ended before the blow


def _victim(box: Box, process: Any, draw: random.Random) -> tuple[str, psutil.Process]:
    """A role first and then one of its processes, so that a single shipper is hit as often as a crowd of workers."""
    by_role: dict[str, list[psutil.Process]] = {}
    for one in box.processes():
        with suppress(psutil.Error):
            by_role.setdefault(box.role(one, process), []).append(one)
    if len(by_role) > 1:
        by_role.pop("command", None)  # which has faults of its own
    role = draw.choice(sorted(by_role)) if by_role else "command"
    return role, draw.choice(sorted(by_role[role], key=lambda one: one.pid)) if by_role else psutil.Process(process.pid)


def attempt(box: Box, seconds: float, draw: random.Random, tally: Tally) -> list[str]:
    """Disturb the command and bring it to its end; returns the faults found on the way."""
    faults: list[str] = []
    for _ in range(draw.randint(1, 3)):
        process, fault = box.start(), draw.choice(FAULTS)
        process.join(draw.uniform(0.0, seconds))
        if process.exitcode is None:
            fault = strike(box, process, fault, draw)
            tally.blows.update([fault] if fault else [])
        process.join(_HUNG_S)
        if process.exitcode is None:
            return [*faults, f"hangs after {fault}"]
        if _TRACEBACK in box.said():
            faults.append(f"{fault}: a traceback")
        faults += [f"{fault}: {one}" for one in _safely(box.story.whole, box.folder)]
    codes: list[int | None] = []
    for _ in range(_AGAIN):
        process = box.start()
        process.join(_HUNG_S)
        if process.exitcode == 0:
            return faults + box.end()
        codes.append(process.exitcode)
    return [*faults, f"does not end well any more: exit codes {codes}"]


_TRACEBACK = "Traceback (most recent call last)"


def _safely(look: Any, folder: Path) -> list[str]:
    try:
        return look(folder)
    except Exception as error:  # noqa: BLE001 - what cannot be read is a fault of the product
        return [f"{type(error).__name__}: {error}"]


def disturb(
    story: Story, base: Path, folder: Path, server: Any, until: float, seed: int, most: float = math.inf
) -> Tally:
    """Tries until the time is over or so many blows are struck, after an undisturbed one."""
    calm = Box(story, base, folder / f"{story.name.replace(' ', '_')}-calm", server)
    began = time.monotonic()
    process = calm.start()
    process.join(_HUNG_S)
    seconds = time.monotonic() - began
    calm.end()
    if process.exitcode != 0:
        calm.close(keep=False)
        sys.exit(f"undisturbed, {story.name} ends with exit code {process.exitcode}:\n{calm.log.read_text()}")
    expected, tally = story.result(calm.folder), Tally()
    while (time.monotonic() < until and tally.blows.total() < most) or not tally.tries:
        number = tally.tries
        draw = random.Random(f"{seed}/{story.name}/{number}")
        box = Box(story, base, folder / f"{story.name.replace(' ', '_')}-{number}", server)
        faults = attempt(box, seconds, draw, tally)
        if not faults:
            found = _safely(
                lambda place: [] if (got := story.result(place)) == expected else [_other(expected, got)], box.folder
            )
            faults = found
        box.end()
        tally.tries += 1
        tally.faults += [f"seed {seed}/{story.name}/{number}: {fault} ({box.log})" for fault in faults]
        box.close(keep=bool(faults))
    calm.close(keep=False)
    return tally


def prepared() -> Any:
    """What starts processes that have the slow imports behind them, with the environment of now."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        [
            "pipeline.__main__",
            "pipeline.cli",
            "pipeline.training.run",
            "deepspeed",
            "open_clip",
            "pipeline.handoff.promote",
        ]
    )
    return server


def _other(expected: dict[str, Any], found: dict[str, Any]) -> str:
    keys = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    return "another result: " + ", ".join(
        f"{key} {str(found.get(key))[:60]} for {str(expected.get(key))[:60]}" for key in keys[:3]
    )


def table(tallies: dict[str, Tally], seed: int) -> str:
    """Commands against kinds of blows, as Markdown."""
    kinds = sorted({fault for tally in tallies.values() for fault in tally.blows})
    head = f"| command | tries | {' | '.join([*kinds, 'blows'])} | faults found |"
    lines = [f"Seed {seed}.", "", head, "|" + "---|" * (len(kinds) + 4)]
    for name, tally in tallies.items():
        blows = " | ".join(str(tally.blows[kind]) for kind in kinds)
        lines.append(f"| {name} | {tally.tries} | {blows} | {tally.blows.total()} | {len(tally.faults)} |")
    lines += ["", *(f"- {fault}" for tally in tallies.values() for fault in tally.faults)]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all commands together")
    parser.add_argument("--blows", type=float, default=math.inf, help="for a command; its time then goes to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=[story.name for story in STORIES], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"))
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "TOKENIZERS_PARALLELISM": "false"}
    server = prepared()
    folder = Path(tempfile.mkdtemp(prefix="selora-chaos-"))
    os.environ["SELORA_CACHE"] = str(folder / "cache")

    def run(command: list[str]) -> None:
        process = server.Process(target=_command, args=(command, folder / "base.log", "base"))
        process.start()
        process.join()
        assert process.exitcode == 0, (folder / "base.log").read_text()

    base = base_of(folder / "base", run)
    chosen = [story for story in STORIES if options.commands is None or story.name in options.commands]
    begin, tallies = time.monotonic(), {}
    for number, story in enumerate(chosen, 1):
        until = begin + options.minutes * 60 * number / len(chosen)
        tallies[story.name] = disturb(story, base, folder / "boxes", server, until, options.seed, options.blows)
        text = table(tallies, options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "chaos.md").write_text(text, encoding="utf-8")
        print(text.splitlines()[3 + number], flush=True)
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    print("\n".join(faults))
    if not faults:
        shutil.rmtree(folder)
    print(f"{sum(tally.tries for tally in tallies.values())} tries, {len(faults)} faults; {options.out / 'chaos.md'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
