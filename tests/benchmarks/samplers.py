"""A sampler against a grid: the demo's data, as many trials for each, and the best accuracy that keeps 95 %.

    python tests/benchmarks/samplers.py --out build/samplers                 # both sweeps for three seeds
    python tests/benchmarks/samplers.py --out build/samplers --kill 3        # each search's driver is killed thrice
    python tests/benchmarks/samplers.py --out build/samplers --table         # the table of what is finished

Both choose the learning rate, the rank and the weight of `keep` of LoRA. The sampler draws from ranges that hold the
grid and begins with the demo's own values. A seed is that of the trials and of the sampler.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack
from pipeline.runs.results import EVAL, read_floors
from pipeline.runs.sweep import read_state, read_sweep, trial_dir
from pipeline.selection.frontier import floors_of

FLOOR = 0.95
GRID = {"rank": [16, 64], "train.lr": [1e-3, 2e-3, 4e-3], "keep.weight": [1, 3]}
RANGES = {
    "rank": {"choices": [16, 32, 64, 128]},
    "train.lr": {"log": [5e-4, 8e-3]},
    "keep.weight": {"log": [0.3, 10.0]},
}
TRIALS = 12
SWEEPS: dict[str, dict[str, Any]] = {
    "grid": {"grid": GRID},
    "tpe": {"search": {"trials": TRIALS, "sampler": "tpe"}, "ranges": RANGES},
    "random": {"search": {"trials": TRIALS, "sampler": "random"}, "ranges": RANGES},
}
SETTINGS = {
    "train.steps": 30,
    "train.global_batch_size": 64,
    "train.lr": 2e-3,
    "gate.enabled": "false",
    "keep.weight": 3,
    "keep.batch_size": 8,
    "eval.datasets": "[clothing, grocery, clipart]",
    "tracking.enabled": "false",
}


class Best(NamedTuple):
    """The best trial of a finished sweep at the floor."""

    id: float
    kept: float
    alpha: float
    name: str


def command(out: Path, kind: str, seed: int) -> list[str]:
    """The sweep of one kind and seed below OUT, as it is typed."""
    data, config = out / "data", out / "config.yaml"
    lines = {
        "base": str(asset(FINETUNE)),
        "model": {"name": f"local-dir:{asset(MODEL)}"},
        "data": {"train": str(data / "clothing_train")},
        "keep": {"images": str(data / "reference")},
        "eval": {"benchmark": str(data / "benchmark.yaml")},
    }
    config.write_text(yaml.safe_dump(lines), encoding="utf-8")
    grid = out / f"{kind}.yaml"
    resources = {"workers": 1, "cpus_per_worker": 1, "eval_cpus": 1, "concurrent": 1}
    grid.write_text(yaml.safe_dump({**SWEEPS[kind], "floor": FLOOR, "resources": resources}), encoding="utf-8")
    options = {**SETTINGS, "seed": seed, "out": out, "name": f"{kind}-s{seed}"}
    changes = [f"{key}={value}" for key, value in options.items()]
    return [sys.executable, "-m", "pipeline", "sweep", str(config), str(grid), *changes]


def sweep(out: Path, kind: str, seed: int, kills: int) -> None:
    """Run one sweep to its end; its driver is killed so often on the way, each time after three more trials."""
    sweep_dir, log = out / f"{kind}-s{seed}", out / f"{kind}-s{seed}.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for number in range(1, kills + 2):
        with log.open("a", encoding="utf-8") as file:
            driver = subprocess.Popen(command(out, kind, seed), stdout=file, stderr=file, env=environment)
        while number <= kills and driver.poll() is None and len(finished(sweep_dir)) < 3 * number:
            time.sleep(0.5)
        if number <= kills and driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
        driver.wait()


def finished(sweep_dir: Path) -> list[str]:
    """Names of the finished trials."""
    if not (sweep_dir / "sweep.json").exists():
        return []
    names = [each["name"] for each in read_sweep(sweep_dir)["trials"]]
    return [name for name in names if read_state(trial_dir(sweep_dir, name)).status == "finished"]


def best(sweep_dir: Path) -> Best | None:
    """The best trial; None for a sweep that is not finished."""
    found = []
    for name in finished(sweep_dir):
        at = floors_of(read_floors(trial_dir(sweep_dir, name) / EVAL))[FLOOR]
        found.append(Best(at.id, at.kept, at.alpha, name))
    return max(found) if len(found) >= TRIALS else None


def table(out: Path, seeds: list[int]) -> str:
    """One row a seed and kind."""
    head = "| seed | search | best id at 95 % | its share kept | α | trial |"
    lines = [head, "|" + "---|" * 6]
    for seed in seeds:
        for kind in SWEEPS:
            if (one := best(out / f"{kind}-s{seed}")) is not None:
                lines.append(
                    f"| {seed} | {kind} | {100 * one.id:.1f} | {100 * one.kept:.1f} | {one.alpha:g} | {one.name} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", choices=SWEEPS, nargs="+", default=["grid", "tpe"])
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="kill the driver of a search N times")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    asked = parser.parse_args()
    out = asked.out.absolute()
    if not asked.table:
        unpack(out / "data")
        for seed in asked.seeds:
            for kind in asked.kinds:
                if best(out / f"{kind}-s{seed}") is None:
                    sweep(out, kind, seed, asked.kill if kind != "grid" else 0)
    print(table(out, asked.seeds))


if __name__ == "__main__":
    main()
