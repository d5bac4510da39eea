"""The strength curve: merged weights between the untouched and the fine-tuned model, W0 + α (W1 − W0), in one pass.

It is right for whatever trained, DoRA and full fine-tuning included, because it mixes what was merged and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.evaluation.benchmark import Benchmark
from pipeline.evaluation.dataset import Settings
from pipeline.evaluation.results import write_json
from pipeline.evaluation.run import Job, Say, finish, walk_table
from pipeline.model.load import Model
from pipeline.model.restore import find_run, load_base, load_run

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
STRENGTH_FILE = "strength.json"

Curve = dict[str, Any]


def evaluate_strength(
    run_dir: str | Path,
    benchmark: Benchmark,
    out_dir: str | Path,
    settings: Settings,
    *,
    baselines: str | Path,
    alphas: Sequence[float] = ALPHAS,
    datasets: Sequence[str] | None = None,
    say: Say | None = None,
) -> Curve:
    """Evaluate a run's model at each strength; write OUT_DIR/strength.json and return what it holds.

    The datasets of one α lie in OUT_DIR/strength/<α>, so a broken curve is continued; results of the untouched and of
    the fine-tuned model that lie in BASELINES and OUT_DIR are taken over. All models are in memory at once.
    """
    if not alphas or any(not 0 <= alpha <= 1 for alpha in alphas):
        raise ConfigError(f"strength: {list(alphas)} should be numbers from 0 (untouched) to 1 (fine-tuned)")
    started = time.perf_counter()
    source, out = find_run(run_dir), Path(out_dir)
    base, tuned = load_base(source), load_run(run_dir)
    known = (Path(baselines) / source.base_digest[:16], out)
    levels = sorted(set(alphas))
    jobs = [
        Job(
            replace(between(base, tuned, alpha), pretrained=f"{source.label} at {alpha:g}"),
            out / "strength" / f"{alpha:g}",
            f"strength {alpha:g}",
            known,
        )
        for alpha in levels
    ]
    walk = walk_table(jobs, benchmark, settings, datasets=datasets, say=say)
    untouched = finish(walk, 0, benchmark, None).summary if levels[0] == 0 else None
    summaries = [finish(walk, i, benchmark, untouched).summary for i in range(len(jobs))]
    curve: Curve = {
        "benchmark": benchmark.name,
        "model": source.label,
        "seconds": round(time.perf_counter() - started, 3),
        "alphas": levels,
        "groups": {
            str(alpha): {group: found["mean"] for group, found in summary["groups"].items()}
            for alpha, summary in zip(levels, summaries, strict=True)
        },
        "datasets": {
            str(alpha): {key: each["value"] for key, each in summary["datasets"].items()}
            for alpha, summary in zip(levels, summaries, strict=True)
        },
    }
    if walk.ranks.rank == 0:
        write_json(out / STRENGTH_FILE, curve)
    return curve


def between(base: Model, tuned: Model, alpha: float) -> Model:
    """A copy of the merged model with weights W0 + α (W1 − W0); at 0 and 1 bit for bit those of `base` and `tuned`.

    What the base has not, the classifier of a ViT, stays that of `tuned`.
    """
    model = deepcopy(tuned.model)
    start = base.model.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in start:
                value.copy_(_mixed(start[name], value, alpha))
    return replace(tuned, model=model)


def _mixed(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    if not start.is_floating_point():
        return end if alpha >= 0.5 else start
    # What did not train stays as it is, to the last bit, whatever the rounding in between would do.
    return torch.where(start == end, start, torch.lerp(start, end, alpha))


def format_curve(curve: Curve) -> str:
    """The group means by strength for the terminal, in percent."""
    groups = list(next(iter(curve["groups"].values())))
    lines = ["  ".join(["strength", *(group.rjust(9) for group in groups)])]
    for alpha in curve["alphas"]:
        means = curve["groups"][str(alpha)]
        lines.append("  ".join([f"{alpha:g}".rjust(8), *(f"{100 * means[group]:9.2f}" for group in groups)]))
    return "\n".join(lines)
