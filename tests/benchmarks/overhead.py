"""The cost of a sweep's trials beyond training and evaluation.

    python tests/benchmarks/overhead.py --out build/overhead  # run a sweep of 5 short trials of the demo first
    python tests/benchmarks/overhead.py --sweep SWEEP_DIR     # a sweep that is there

A sweep needs `resources: {concurrent: 1}` and `train.log_every=1`. Everything is read from the journals and the result
files of its trials. Elapsed seconds, as median and range over all trials but the first, which also pays for what later
ones find warm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the checkout, where it is not installed

import yaml

from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack
from pipeline.runs.sweep import is_sweep, read_state, trial_dirs
from pipeline.tracking.journal import JOURNAL, Record, read

# part -> what it is; the two that are not overhead come last
PARTS = {
    "start": "from the end of the trial before: Ray's workers, imports, the model",
    "first step": "DeepSpeed's engine, the loader, the first step",
    "save": "the last checkpoint, the end of the workers",
    "hand over": "the process of the evaluation, loading the models",
    "record": "results into journal and trial.json",
    "training": "from the first step to the last",
    "evaluation": "over the images, of the trial and where needed of the untouched model",
}
USEFUL = ("training", "evaluation")
RANKS = [4, 8, 16, 32, 64]


def parts_of(before: Path, trial: Path) -> dict[str, float]:
    """Seconds of each part of a trial, which began when the one before it ended."""
    records = [each for each in read(trial / JOURNAL) if isinstance(each, Record)]
    steps = [each.time_ms / 1000 for each in records if each.kind == "metrics" and "train/loss" in each.data["values"]]
    statuses = {each.data["status"]: each.time_ms / 1000 for each in records if each.kind == "status"}
    evaluated = [
        each.time_ms / 1000
        for each in records
        if each.kind == "metrics" and any(name.startswith("eval/") for name in each.data["values"])
    ]
    results = [json.loads(file.read_text()) for file in (trial / "eval").rglob("*.json")]
    evaluation = sum(each["seconds"] for each in results if "metrics" in each)
    running, trained = statuses["RUNNING"], statuses["FINISHED"]
    ended = [datetime.fromisoformat(read_state(each).updated).timestamp() for each in (before, trial)]
    return {
        "start": running - ended[0],
        "first step": steps[0] - running,
        "save": trained - steps[-1],
        "hand over": evaluated[-1] - trained - evaluation,
        "record": max(0.0, ended[1] - evaluated[-1]),
        "training": steps[-1] - steps[0],
        "evaluation": evaluation,
    }


def run(out: Path) -> Path:
    """A sweep over ranks with one trial after the other, each of 10 steps and two datasets; returns its directory."""
    data, grid = unpack(out / "data"), out / "grid.yaml"
    resources = {"workers": 1, "cpus_per_worker": 1, "eval_cpus": 1, "concurrent": 1}
    grid.write_text(yaml.safe_dump({"grid": {"rank": RANKS}, "resources": resources}), encoding="utf-8")
    options = {
        "out": out,
        "name": "overhead",
        "model.name": f"local-dir:{asset(MODEL)}",
        "data.train": data / "clothing_train",
        "train.steps": 10,
        "train.log_every": 1,
        "train.global_batch_size": 64,
        "eval.benchmark": data / "benchmark.yaml",
        "eval.datasets": "[clothing, grocery]",
    }
    command = [sys.executable, "-m", "pipeline", "sweep", str(asset(FINETUNE)), str(grid)]
    subprocess.run([*command, *(f"{key}={value}" for key, value in options.items())], check=True, stdout=sys.stderr)
    return out / "overhead"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, help="run a sweep into this folder")
    wanted.add_argument("--sweep", type=Path, help="look at this sweep")
    asked = parser.parse_args()
    if asked.sweep and not is_sweep(asked.sweep):
        parser.error(f"--sweep {asked.sweep}: no sweep is there")
    sweep_dir = asked.sweep or run(asked.out.absolute())
    finished = [each for each in trial_dirs(sweep_dir) if read_state(each).status == "finished"]
    finished.sort(key=lambda each: read_state(each).updated)
    found = [parts_of(before, trial) for before, trial in pairwise(finished)]
    if not found:
        print(f"{sweep_dir}: needs two finished trials", file=sys.stderr)
        return 2
    totals = [sum(value for part, value in parts.items() if part not in USEFUL) for parts in found]
    print(f"| part | seconds, median of {len(found)} | range | what |\n| --- | ---: | ---: | --- |")
    for part, what in PARTS.items():
        print(_line(part, [parts[part] for parts in found], what))
    print(_line("**overhead**", totals, "all but training and evaluation"))
    return 0


def _line(name: str, values: list[float], what: str) -> str:
    return f"| {name} | {median(values):.1f} | {min(values):.1f} to {max(values):.1f} | {what} |"


if __name__ == "__main__":
    sys.exit(main())
