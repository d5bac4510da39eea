"""python tests/benchmarks/settling.py [--out DIR] [--steps 100] [--settle 10]: what settling gates changes in a run.

The demo's gated LoRA is trained twice on the same batches, freely and with `gate.settle_steps`. Writes settling.md
(loss, blocks, speed) and settling.png (both loss curves, the blocks that are open and settled) into DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, where it is not installed

Curve = dict[str, dict[int, float]]  # metric -> step -> value
# Okabe and Ito's colours, which all eyes tell apart.
FREE, SETTLED, THIRD = "#0072B2", "#D55E00", "#009E73"


def train(folder: Path, name: str, steps: int, more: list[str]) -> Curve:
    """The metrics of one training of the demo, from its journal."""
    from pipeline.demo.assets import FINETUNE, MODEL, asset

    wanted = {
        "name": name,
        "out": folder / "runs",
        "model.name": f"local-dir:{asset(MODEL)}",
        "data.train": folder / "clothing_train",
        "train.steps": steps,
        "train.log_every": 2,
        "train.gates_every": 2,
        "train.checkpoint_every": steps,
        "tracking.enabled": "false",
    }
    command = [sys.executable, "-m", "pipeline", "train", str(asset(FINETUNE))]
    command += [f"{key}={value}" for key, value in wanted.items()] + more
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    curve: Curve = {}
    for line in (folder / "runs" / name / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        for metric, value in record["values"].items() if record["kind"] == "metrics" else ():
            curve.setdefault(metric, {})[record["step"]] = value
    return curve


def table(free: Curve, settled: Curve, steps: int) -> str:
    """Both runs side by side; the speed is the median of the run's second half."""
    rows = ["| | free | settling |", "| --- | --: | --: |"]
    for at in (steps // 4, steps // 2, steps):
        at += at % 2
        rows.append(f"| task loss at step {at} | {free['train/task'][at]:.4f} | {settled['train/task'][at]:.4f} |")
    for metric, what in (("adapter/active_blocks", "open"), ("adapter/settled_blocks", "settled")):
        ends = [f"{run[metric][steps]:.0f}" if metric in run else "0" for run in (free, settled)]
        rows.append(f"| blocks {what} at the end | {ends[0]} | {ends[1]} |")
    speeds = [median(v for s, v in run["train/images_per_s"].items() if s > steps // 2) for run in (free, settled)]
    rows.append(f"| images/s in the second half | {speeds[0]:.0f} | {speeds[1]:.0f} |")
    gap = max(abs(settled["train/task"][step] - value) for step, value in free["train/task"].items())
    again = sum(free["adapter/toggles"].values())
    rows += ["", f"Largest difference of the task losses {gap:.4f}; gates changed {again:.0f} times in the free run."]
    return "\n".join(rows) + "\n"


def figure(free: Curve, settled: Curve, file: Path) -> None:
    drawing = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for name, run, colour, style in (("free", free, FREE, "-"), ("settling", settled, SETTLED, "--")):
        left.plot(*zip(*sorted(run["train/task"].items()), strict=True), style, color=colour, label=name)
        right.plot(*zip(*sorted(run["adapter/active_blocks"].items()), strict=True), style, color=colour,
                   label=f"open, {name}")  # fmt: skip
    right.plot(*zip(*sorted(settled["adapter/settled_blocks"].items()), strict=True), ":", color=THIRD, label="settled")
    left.set_title("Training with gates that settle, and without", loc="left", fontsize=11)
    left.set_ylabel("FLYP loss (nats)")
    right.set_title("Blocks", loc="left", fontsize=11)
    right.set_ylabel("blocks of 144")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    drawing.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--settle", type=int, default=10, help="gate.settle_steps of the second run")
    arguments = parser.parse_args()
    from pipeline.demo.assets import unpack

    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        unpack(folder, "clothing_train.tar.gz")
        free = train(folder, "free", arguments.steps, [])
        settled = train(folder, "settling", arguments.steps, [f"gate.settle_steps={arguments.settle}"])
    text = table(free, settled, arguments.steps)
    (arguments.out / "settling.md").write_text(text)
    figure(free, settled, arguments.out / "settling.png")
    print(text)


if __name__ == "__main__":
    main()
