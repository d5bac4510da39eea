"""python tests/chaos/chaos.py [--minutes M] [--seed S] [--commands NAME ..]: commands disturbed at random moments.

Each try runs one command in a box of its own, strikes it one to three times at moments drawn from the seed, gives the
command again until it ends well, and compares what came out with an undisturbed run, bit by bit. The last line says how
many tries found a fault; a table goes to --out, with the seed of every try that did.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, where it is not installed

import psutil
from stories import STORIES, Story, base_of

ROOT = Path(__file__).parents[2]
MARK = "SELORA_CHAOS"  # in the environment of every process that a try starts
FAULTS = ("kill", "kill one", "stop", "terminate", "interrupt")
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
    os.setsid()
    os.environ[MARK] = mark
    with log.open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    from pipeline.cli import main

    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


class Box:
    """One try: the command's directory, its processes, and what they printed."""

    def __init__(self, story: Story, base: Path, folder: Path, server: Any) -> None:
        self.story, self.base, self.folder, self._server = story, base, folder, server
        self.mark, self.log = f"{os.getpid()}-{folder.name}", folder.with_suffix(".log")
        self._sessions: set[int] = set()
        folder.mkdir(parents=True)
        for name in story.inputs:
            (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, folder / name)

    def start(self, argv: list[str] | None = None) -> Any:
        argv = argv or self.story.argv(self.base, self.folder)
        process = self._server.Process(target=_command, args=(argv, self.log, self.mark))
        process.start()
        self._sessions.add(process.pid)
        return process

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

    def end(self) -> list[str]:
        """Faults of what is left over; ends it."""
        deadline = time.monotonic() + _ALONE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = [" ".join(process.cmdline()[:6]) for process in left]
        for process in left:
            process.kill()
        return [f"still runs: {name}" for name in names]


def strike(box: Box, process: Any, fault: str, draw: random.Random) -> None:
    """One blow; `process` is the command's own."""
    numbers = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
    try:
        if fault in numbers:
            os.kill(process.pid, numbers[fault])
            return
        victim = draw.choice(box.processes() or [psutil.Process(process.pid)])
        if fault == "kill one":
            victim.kill()
            return
        victim.suspend()
        time.sleep(draw.uniform(0.5, 3.0))
        victim.resume()
    except (psutil.Error, OSError):
        pass  # it ended before the blow


def attempt(box: Box, seconds: float, draw: random.Random, tally: Tally) -> list[str]:
    """Disturb the command and bring it to its end; returns the faults found on the way."""
    faults: list[str] = []
    for _ in range(draw.randint(1, 3)):
        process, fault = box.start(), draw.choice(FAULTS)
        process.join(draw.uniform(0.0, seconds))
        if process.exitcode is None:
            strike(box, process, fault, draw)
            tally.blows[fault] += 1
        process.join(_HUNG_S)
        if process.exitcode is None:
            return [*faults, f"hangs after {fault}"]
        faults += [f"{fault}: {one}" for one in _safely(box.story.whole, box.folder)]
    for _ in range(_AGAIN):
        process = box.start()
        process.join(_HUNG_S)
        if process.exitcode == 0:
            return faults + box.end()
    return [*faults, f"does not end well any more: exit code {process.exitcode}"]


def _safely(look: Any, folder: Path) -> list[str]:
    try:
        return look(folder)
    except Exception as error:  # noqa: BLE001 - what cannot be read is a fault of the product
        return [f"{type(error).__name__}: {error}"]


def disturb(story: Story, base: Path, folder: Path, server: Any, until: float, seed: int) -> Tally:
    """Tries until the time is over, the first of them undisturbed."""
    calm = Box(story, base, folder / f"{story.name.replace(' ', '_')}-calm", server)
    began = time.monotonic()
    process = calm.start()
    process.join(_HUNG_S)
    seconds = time.monotonic() - began
    assert process.exitcode == 0, calm.log.read_text()
    calm.end()
    expected, tally = story.result(calm.folder), Tally()
    while time.monotonic() < until or not tally.tries:
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
        if not faults:
            shutil.rmtree(box.folder)
    return tally


def _other(expected: dict[str, Any], found: dict[str, Any]) -> str:
    keys = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    return "another result: " + ", ".join(
        f"{key} {str(found.get(key))[:60]} for {str(expected.get(key))[:60]}" for key in keys[:3]
    )


def table(tallies: dict[str, Tally], seed: int) -> str:
    """Commands against kinds of blows, as Markdown."""
    head = f"| command | tries | {' | '.join(FAULTS)} | faults found |"
    lines = [f"Seed {seed}.", "", head, "|" + "---|" * (len(FAULTS) + 3)]
    for name, tally in tallies.items():
        blows = " | ".join(str(tally.blows[fault]) for fault in FAULTS)
        lines.append(f"| {name} | {tally.tries} | {blows} | {len(tally.faults)} |")
    lines += ["", *(f"- {fault}" for tally in tallies.values() for fault in tally.faults)]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=[story.name for story in STORIES], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"))
    options = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "TOKENIZERS_PARALLELISM": "false"}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pipeline.training.run", "deepspeed", "open_clip", "pipeline.handoff.promote"])
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
        tallies[story.name] = disturb(story, base, folder / "boxes", server, until, options.seed)
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
