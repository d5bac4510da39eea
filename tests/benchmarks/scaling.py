"""python tests/benchmarks/scaling.py [--ranks 1 2] [--steps 30] [key=value ..]: the demo's training under torchrun.

Prints images a second, the share of the time that ranks spend in collectives (waiting for each other included), and the
bytes that a rank sends in a step, measured beside what docs/scaling.md's formulas say. Ranks share the cores there are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent

# How often a ring sends the largest tensor of a call, in units of (N - 1) / N.
TIMES_SENT = {
    "all_reduce": 2,
    "reduce": 1,
    "broadcast": 1,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
    "barrier": 0,
}
LOG_EVERY = 5


@dataclass
class Meter:
    """Time and bytes of this process's collectives; reads itself whenever the run records values."""

    seconds: float = 0.0
    sent: float = 0.0
    by: dict[str, float] = field(default_factory=dict)
    inside: bool = False
    marks: list[tuple[int, float, float, float]] = field(default_factory=list)

    def recorded(self, step: int, values: Mapping[str, float]) -> None:
        if "train/images_per_s" in values:
            self.marks.append((step, time.perf_counter(), self.seconds, self.sent))

    def stop_requested(self) -> bool:
        return False

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if self.inside:
                return call(*arguments, **named)
            self.inside, start = True, time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.inside = False
                self.seconds += time.perf_counter() - start
                largest = max((_bytes(each) for each in (*arguments, *named.values())), default=0)
                ranks = dist.get_world_size() if dist.is_initialized() else 1
                sent = TIMES_SENT[name] * largest * (ranks - 1) / ranks
                self.sent += sent
                self.by[name] = self.by.get(name, 0.0) + (sent if self.marks else 0.0)

        return wrapped


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(_bytes(each) for each in value) if isinstance(value, list | tuple) else 0


def measure(result: Path, config_file: Path, overrides: list[str]) -> None:
    """One rank: the training as it is, with a clock around what torch.distributed does."""
    meter = Meter()
    for name in TIMES_SENT:
        setattr(dist, name, meter.timed(name, getattr(dist, name)))
    work: Any = dist.Work  # what is begun asynchronously is waited for here
    work.wait = meter.timed("barrier", work.wait)
    from pipeline.config import load_config
    from pipeline.training.run import train

    train(load_config(config_file, overrides), meter)
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps({"marks": meter.marks, "by": meter.by}))


def settings(folder: Path, ranks: int, steps: int, more: list[str]) -> list[str]:
    from pipeline.demo.assets import MODEL, asset

    wanted = {
        "name": f"ranks_{ranks}",
        "out": folder / "runs",
        "model.name": f"local-dir:{asset(MODEL)}",
        "data.train": folder / "clothing_train",
        "train.steps": steps,
        "train.log_every": LOG_EVERY,
        "train.checkpoint_every": steps,
        "tracking.enabled": "false",
    }
    return [f"{key}={value}" for key, value in wanted.items()] + more


def run(folder: Path, ranks: int, overrides: list[str]) -> dict[str, Any]:
    from pipeline.demo.assets import FINETUNE, asset

    result = folder / f"ranks-{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--measure", str(result), str(asset(FINETUNE)), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(result.read_text())


def lines(folder: Path, wanted: list[int], steps: int, more: list[str]) -> Iterator[str]:
    from pipeline.config import load_config
    from pipeline.costs.scale import contrastive_traffic, gradient_traffic, shape_of
    from pipeline.demo.assets import FINETUNE, asset
    from pipeline.model.clip import model_config

    yield "| ranks | images/s | in collectives | MB sent per step and rank: measured | computed |"
    yield "| --: | --: | --: | --: | --: |"
    notes: list[str] = []
    for ranks in wanted:
        overrides = settings(folder, ranks, steps, more)
        config = load_config(asset(FINETUNE), overrides)
        found = run(folder, ranks, overrides)
        marks = found["marks"]
        spans = list(pairwise(marks))  # the first span starts with the model's broadcast
        batch = config.train.global_batch_size
        rate = median((b[0] - a[0]) * batch / (b[1] - a[1]) for a, b in spans)
        share = median((b[2] - a[2]) / (b[1] - a[1]) for a, b in spans)
        sent = median((b[3] - a[3]) / (b[0] - a[0]) for a, b in spans)
        shape = shape_of(config.model.name, model_config(config.model.name))
        assert shape is not None
        kinds = {"rest": config.train.train_rest == "all", "dora": config.adapter.kind == "dora"}
        trained = shape.trained(config.adapter.rank, **kinds)
        computed = gradient_traffic(config.train.zero_stage, shape.parameters, trained, ranks)
        computed += contrastive_traffic(batch, shape.embed, ranks)
        yield f"| {ranks} | {rate:.0f} | {100 * share:.1f} % | {sent / 1e6:.2f} | {computed / 1e6:.2f} |"
        by = ", ".join(f"{name} {sent / 1e6:.1f} MB" for name, sent in found["by"].items() if sent)
        notes += [f"{ranks} ranks, {marks[-1][0] - marks[0][0]} steps: {by}"] if by else []
    yield from ["", *notes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the checkout, where it is not installed
    if arguments.measure is not None:
        measure(arguments.measure, Path(arguments.overrides[0]), arguments.overrides[1:])
        return
    from pipeline.demo.assets import unpack

    with tempfile.TemporaryDirectory() as scratch:
        unpack(Path(scratch), "clothing_train.tar.gz")
        for line in lines(Path(scratch), arguments.ranks, arguments.steps, arguments.overrides):
            print(line, flush=True)


if __name__ == "__main__":
    main()
