"""python tests/chaos/soak.py [--trials N] [--minutes M]: many tiny trials on one Ray cluster; does anything grow?

Runs one sweep and looks every few seconds at what all of its processes hold together (memory, file handles, threads),
at the size of the tracking database, and at the time between the ends of two trials. Of each it fits a line over the
trials done, the first fifth left out as warming up, and says the slope with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, where it is not installed

import numpy as np
import psutil
from scipy import stats

ROOT = Path(__file__).parents[2]
MARK = "SELORA_SOAK"
# What is looked at: its unit, and the factor to it.
LOOKED_AT = {
    "memory": ("MB", 1e-6),
    "file handles": ("", 1),
    "threads": ("", 1),
    "processes": ("", 1),
    "database": ("kB", 1e-3),
    "driver memory": ("MB", 1e-6),
    "driver file handles": ("", 1),
}


def settings_of(folder: Path, trials: int) -> tuple[Path, Path]:
    """A config and a grid of so many trials, each of three steps and without an evaluation."""
    from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack

    unpack(folder / "data", "clothing_train.tar.gz")
    config, grid = folder / "config.yaml", folder / "grid.yaml"
    config.write_text(
        f"base: {asset(FINETUNE)}\n"
        f"model: {{name: 'local-dir:{asset(MODEL)}'}}\n"
        f"data: {{train: {folder}/data/clothing_train, streams: 8, workers: 0}}\n"
        "eval: {benchmark: null}\n"
        "keep: {weight: 0, images: null, texts: null}\n"
        "train: {steps: 3, global_batch_size: 8, checkpoint_every: 3, log_every: 1, gates_every: 3, warmup_steps: 1}\n",
        encoding="utf-8",
    )
    seeds = ", ".join(map(str, range(trials)))
    grid.write_text(
        f"grid: {{rank: [2], seed: [{seeds}]}}\n"
        "resources: {workers: 1, cpus_per_worker: 1, eval_cpus: 1, concurrent: 1}\n",
        encoding="utf-8",
    )
    return config, grid


def holdings(driver: psutil.Process, database: Path) -> dict[str, float]:
    """What all processes of the sweep hold now; shared pages count once in each."""
    found = dict.fromkeys(LOOKED_AT, 0.0)
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) != str(driver.pid) and process.pid != driver.pid:
                continue
            with process.oneshot():
                held = process.memory_info().rss, process.num_fds(), process.num_threads(), 1
        except (psutil.Error, OSError):
            continue
        for name, value in zip(("memory", "file handles", "threads", "processes"), held, strict=True):
            found[name] += value
        if process.pid == driver.pid:
            found["driver memory"], found["driver file handles"] = held[0], held[1]
    found["database"] = database.stat().st_size if database.exists() else 0
    return found


def ended(sweep: Path) -> list[float]:
    """When the trials that are over ended, as the time of their last state."""
    times = []
    for file in sweep.glob("trials/*/trial.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if content["status"] in ("finished", "failed"):
            times.append(file.stat().st_mtime)
    return sorted(times)


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares through 20 means, as neighbours hang together: slope and half the width of its 95 % interval."""
    parts = [part for part in np.array_split(np.arange(len(x)), 20) if len(part)]
    means = [(float(np.mean(np.take(x, part))), float(np.mean(np.take(y, part)))) for part in parts]
    if len(means) < 4:
        return float("nan"), float("nan")
    xs, ys = zip(*means, strict=True)
    fit: Any = stats.linregress(xs, ys)
    return float(fit.slope), float(stats.t.ppf(0.975, len(means) - 2) * fit.stderr)


def summary(samples: list[tuple[float, int, dict[str, float]]], times: list[float]) -> str:
    """A table: first and last value, slope per trial."""
    done = max(number for _, number, _ in samples)
    later = [one for one in samples if one[1] >= done // 5]
    lines = [
        f"{done} trials in {(samples[-1][0] - samples[0][0]) / 60:.0f} minutes, {len(samples)} looks.",
        "",
        "| what | after a fifth | at the end | slope per trial (95 % interval) |",
        "|---|---|---|---|",
    ]
    for name, (unit, factor) in LOOKED_AT.items():
        values = [held[name] * factor for _, _, held in later]
        rise, half = slope([number for _, number, _ in later], values)
        tenth = max(1, len(values) // 10)
        first, last = np.mean(values[:tenth]), np.mean(values[-tenth:])
        lines.append(
            f"| {name} | {first:.0f} {unit} | {last:.0f} {unit} | {rise:+.3f} ± {half:.3f} {unit} |".replace("  ", " ")
        )
    gaps = np.diff(times)[max(1, done // 5) :]
    if len(gaps) > 4:
        rise, half = slope(list(range(len(gaps))), list(gaps))
        lines.append(
            f"| time of a trial | {gaps[:5].mean():.1f} s | {gaps[-5:].mean():.1f} s | {rise:+.3f} ± {half:.3f} s |"
        )
    return "\n".join(lines) + "\n"


def draw(samples: list[tuple[float, int, dict[str, float]]], out: Path) -> None:
    """Each of what was looked at over the trials, in a panel."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = ("memory", "file handles", "threads", "database")
    figure, panels = plt.subplots(1, len(names), figsize=(14, 3), layout="constrained")
    for name, panel in zip(names, panels, strict=True):
        unit, factor = LOOKED_AT[name]
        panel.plot([n for _, n, _ in samples], [held[name] * factor for _, _, held in samples], ".", markersize=2)
        panel.set(title=f"{name}{f' ({unit})' if unit else ''}", xlabel="trials done", ylim=(0, None))
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop the sweep then, however many trials are done")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two looks")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="selora-soak-"))
    config, grid = settings_of(folder, options.trials)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # The mark is the driver's own number, which a shell has before it becomes the driver.
    line = f"export {MARK}=$$; exec {sys.executable} -m pipeline sweep {config} {grid} out={folder}/runs name=soak"
    with (options.out / "sweep.log").open("wb") as log:
        child = subprocess.Popen(
            ["sh", "-c", line], env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    driver, samples, deadline = psutil.Process(child.pid), [], time.monotonic() + options.minutes * 60
    sweep, database = folder / "runs" / "soak", folder / "runs" / "mlflow.db"
    while child.poll() is None:
        samples.append((time.time(), len(ended(sweep)), holdings(driver, database)))
        if time.monotonic() > deadline:
            child.send_signal(signal.SIGINT)
            child.wait(300)
        time.sleep(options.every)
    times = ended(sweep)
    samples = [one for one in samples if times and times[0] <= one[0] <= times[-1]]
    if not samples:
        print(f"no trial came to its end; {options.out / 'sweep.log'}")
        return 1
    (options.out / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    text = summary(samples, times)
    (options.out / "soak.md").write_text(text, encoding="utf-8")
    draw(samples, options.out / "soak.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
