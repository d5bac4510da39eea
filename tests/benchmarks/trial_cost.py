"""Row 16: CPU seconds that a trial costs beyond training and evaluation, in a sweep whose trials follow each other.

    python tests/benchmarks/trial_cost.py [--trials 2]      # of the checkout that this file is in

A sweep of the demo's model runs as a command, and the CPU seconds of all of its processes are sampled; a trial costs
what is added from the end of the trial before to its own end. What training and evaluation alone take is measured in
the same trial run by hand. Elapsed seconds of an idle machine: overhead.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from measure import Line, Ratio

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the checkout, where it is not installed

from pipeline.demo.assets import MODEL, asset, unpack
from pipeline.runs.sweep import read_state, trial_dirs

ROOT = Path(__file__).parent.parent.parent
SAMPLE_SECONDS = 0.3
GRID = {"resources": {"workers": 1, "cpus_per_worker": 0.5, "eval_cpus": 0.5, "concurrent": 1}}
SETS = {"clothing": "id", "emoji": "zero-shot"}


def lay_out(folder: Path, trials: int) -> tuple[Path, Path]:
    """A config and a grid of so many trials: six steps of 32 photos, and an evaluation on two sets."""
    data = unpack(folder / "data", "clothing_train.tar.gz", "eval.tar.gz")
    rows = [{"key": key, "group": group, "path": key} for key, group in SETS.items()]
    (folder / "two.yaml").write_text(yaml.safe_dump({"name": "two", "root": str(data / "eval"), "datasets": rows}))
    config = {
        "out": str(folder / "runs"),
        "model": {"name": f"local-dir:{asset(MODEL)}"},
        "adapter": {"kind": "lora", "rank": 16},
        "gate": {"enabled": False},
        "train": {"train_rest": "none", "warmup_steps": 2, "steps": 6, "global_batch_size": 32, "checkpoint_every": 6},
        "data": {"train": str(data / "clothing_train"), "workers": 0, "templates": ["a photo of {c}."]},
        "eval": {
            "benchmark": str(folder / "two.yaml"),
            "workers": 0,
            "preprocessing": "fast",
            "cache": str(folder / "cache"),
        },
    }
    rates = [round(1e-4 * (number + 1), 6) for number in range(trials)]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID | {"grid": {"train.lr": rates}}))
    return folder / "config.yaml", folder / "grid.yaml"


def cpu_of_trials(config: Path, grid: Path, sweep_dir: Path) -> list[float]:
    """CPU seconds of all processes of the command from the end of each trial to the end of the next."""
    command = [sys.executable, "-m", "pipeline", "sweep", str(config), str(grid), f"name={sweep_dir.name}"]
    with (sweep_dir.parent.parent / "sweep.log").open("w") as log:
        started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    seen: dict[tuple[int, float], float] = {}
    ends: list[float] = []
    while started.poll() is None:
        _sample(psutil.Process(started.pid), seen)
        finished = sum(read_state(each).status == "finished" for each in _trials(sweep_dir))
        ends += [sum(seen.values())] * (finished - len(ends))
        time.sleep(SAMPLE_SECONDS)
    if started.returncode:
        sys.exit((sweep_dir.parent.parent / "sweep.log").read_text())
    return [after - before for before, after in pairwise(ends)]


def _sample(process: psutil.Process, seen: dict[tuple[int, float], float]) -> None:
    """Note the CPU seconds of a process and of all below it; those that have ended stay with what they had."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            times = each.cpu_times()
            seen[each.pid, each.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            continue


def _trials(sweep_dir: Path) -> list[Path]:
    return trial_dirs(sweep_dir) if (sweep_dir / "sweep.json").is_file() else []


def by_hand(run_dir: Path, sender: Any) -> None:
    """Run a trial of a sweep again in this process, and send CPU seconds: {training, evaluation, all}."""
    import shutil

    from pipeline.evaluation import run as evaluation
    from pipeline.runs.sweep import write_state
    from pipeline.training import run as training
    from pipeline.tuning.trial import run_trial

    sweep_dir = run_dir.parent.parent
    for folder in ("checkpoints", "eval"):
        shutil.rmtree(run_dir / folder)
    write_state(run_dir, status="waiting", step=0)
    found = {"training": 0.0, "evaluation": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                found[name] += time.process_time() - began

        return wrapped

    training.train_steps = timed("training", training.train_steps)
    evaluation.evaluate_dataset = timed("evaluation", evaluation.evaluate_dataset)
    began = time.process_time()
    state = run_trial(sweep_dir, run_dir.name)
    found["all"] = time.process_time() - began
    sender.send(found | {"status": state.status})


def measure(trials: int) -> tuple[list[float], dict[str, float]]:
    """CPU seconds of each trial that follows another one, and of one run by hand: {training, evaluation, all}."""
    with tempfile.TemporaryDirectory(prefix="selora-trials-") as name:
        folder = Path(name)
        config, grid = lay_out(folder, trials)
        sweep_dir = folder / "runs" / "cost"
        each = cpu_of_trials(config, grid, sweep_dir)
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=by_hand, args=(_trials(sweep_dir)[-1], sender))
        process.start()
        hand = receiver.recv()
        process.join()
    return each, hand


def row(rounds: int) -> list[Line]:
    """The row, over so many trials that follow another one."""
    each, hand = measure(rounds + 1)
    bare = hand["training"] + hand["evaluation"]
    beyond = [seconds - bare for seconds in each]
    parts = {
        "model, engine, checkpoint and results": hand["all"] - bare,
        "processes, Ray and Tune": median(each) - hand["all"],
        "training": hand["training"],
        "evaluation": hand["evaluation"],
    }
    note = "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    what = "CPU seconds beyond training and evaluation"
    value = Ratio(median(beyond), min(beyond), max(beyond))
    return [Line(16, "trial", what, value, 15.0, False, "0", note)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2, help="that follow another one")
    for line in row(parser.parse_args().trials):
        print(line.what, line.value, line.note)
