"""Models between the untouched and the fine-tuned one, W0 + α (W1 − W0): a curve over α, and single strengths.

One model is in memory at a time; the images are decoded once, into the cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config import ConfigError
from pipeline.display import text_table
from pipeline.evaluation.datasets.benchmark import Benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.run import EvalJob, Outcome, Say, evaluate_jobs
from pipeline.evaluation.summary import Summary
from pipeline.files import replace_json
from pipeline.model.between import Between
from pipeline.model.load import Model
from pipeline.model.restore import RunSource, find_run, load_both
from pipeline.runs.results import STRENGTH_FILE

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
STRENGTHS = "strength"  # the folder next to it, with the results of each strength
AUTO = "auto"  # the largest strength that keeps the floor

Curve = dict[str, Any]
Strength = float | Literal["auto"]


def strength_name(strength: Strength) -> str:
    """Name of the folder with its results: "0.5", "auto"."""
    return strength if isinstance(strength, str) else f"{strength:g}"


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
    """Evaluate a run's model at each strength; write OUT_DIR/strength.json and return its content.

    The results at α are in OUT_DIR/strength/<α>, so an interrupted curve can be continued; results of the untouched and
    of the fine-tuned model in BASELINES and OUT_DIR are reused.
    """
    if not alphas or any(not 0 <= alpha <= 1 for alpha in alphas):
        raise ConfigError(f"strength: {list(alphas)} should be numbers from 0 (untouched) to 1 (fine-tuned)")
    started = time.perf_counter()
    source, out = find_run(run_dir), Path(out_dir)
    between = Between.of(*load_both(source))
    also = (Path(baselines) / source.base_digest[:16], out)
    levels = sorted(set(alphas))
    summaries: list[Summary] = []
    for alpha in levels:
        job = job_at(between.at(alpha), source, alpha, out / STRENGTHS / strength_name(alpha), also)
        [own] = evaluate_jobs([job], benchmark, settings, datasets=datasets, say=say)
        untouched = summaries[0] if summaries and levels[0] == 0 else None
        summaries.append(own.outcome(benchmark, untouched, {"strength": {"alpha": alpha}}).summary)
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
        "kept": _kept(levels, summaries),
    }
    if Ranks.current().rank == 0:
        replace_json(out / STRENGTH_FILE, curve)
    return curve


def _kept(levels: Sequence[float], summaries: Sequence[Summary]) -> dict[str, float]:
    """The share kept at each strength, 1 at 0; empty if the curve has no 0 or there is nothing to keep."""
    shares = {str(alpha): each["kept"]["mean"] for alpha, each in zip(levels, summaries, strict=True) if each["kept"]}
    return {str(levels[0]): 1.0, **shares} if shares else {}


def evaluate_at(
    run_dir: str | Path,
    alpha: float,
    benchmark: Benchmark,
    folder: Path,
    settings: Settings,
    *,
    baselines: Path,
    also: Sequence[Path] = (),
    facts: Mapping[str, Any] | None = None,
    datasets: Sequence[str] | None = None,
    say: Say | None = None,
) -> Outcome:
    """Evaluate a run's model at one strength, and its untouched base if it has no results yet.

    Args:
        folder: folder for the results; those of the base go to BASELINES.
        also: folders that may already hold results of the model.
        facts: entries for the summary's `strength`, in addition to α.
    """
    source = find_run(run_dir)
    base, tuned = load_both(source)
    [own] = evaluate_jobs(
        [EvalJob(base, baselines, "untouched model")], benchmark, settings, datasets=datasets, say=say
    )
    untouched = own.outcome(benchmark, None).summary
    job = job_at(Between.of(base, tuned).at(alpha), source, alpha, folder, also)
    [own] = evaluate_jobs([job], benchmark, settings, datasets=datasets, say=say)
    return own.outcome(benchmark, untouched, {"strength": {"alpha": alpha, **(facts or {})}})


def job_at(model: Model, source: RunSource, alpha: float, folder: Path, also: Sequence[Path] = ()) -> EvalJob:
    """The model of a run at a strength, with the strength in the names of results and messages."""
    named = replace(model, pretrained=f"{source.label} at {alpha:g}")
    return EvalJob(named, folder, f"strength {alpha:g}", tuple(also))


def format_curve(curve: Curve) -> str:
    """The group means by strength for the terminal, and the share kept, in percent."""
    groups = list(next(iter(curve["groups"].values())))
    head = ["strength", *groups, *(["kept"] if curve["kept"] else [])]
    lines = []
    for alpha in curve["alphas"]:
        means, kept = curve["groups"][str(alpha)], curve["kept"].get(str(alpha))
        cells = [f"{100 * means[group]:.2f}" for group in groups]
        cells += [] if not curve["kept"] else ["" if kept is None else f"{100 * kept:.2f}"]
        lines.append([f"{alpha:g}", *cells])
    return text_table(head, lines, left=0)
