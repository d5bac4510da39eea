"""The largest strength that keeps the floor: looked for on a part of the images, reported on the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.evaluation.datasets.benchmark import Benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.run import EvalJob, Outcome, Say, evaluate_jobs
from pipeline.evaluation.strength import AUTO, STRENGTHS, evaluate_at, job_at
from pipeline.evaluation.summary import Summary
from pipeline.model.between import Between
from pipeline.model.restore import RunSource, find_run, load_base, load_run
from pipeline.selection.floor import Floor, strongest


@dataclass(frozen=True)
class ChosenStrength:
    """A strength and what it was chosen by.

    Attributes:
        alpha: 0 where no strength above it keeps the floor.
        floor: in words, as in "promote.min_kept >= 0.95".
        choosing_digest: sha256 over the images it was chosen on.
        margins: strength -> how far it was above the floor on these images, for each that was tried.
    """

    alpha: float
    floor: str
    choosing_digest: str
    margins: Mapping[float, float]

    @property
    def facts(self) -> dict[str, Any]:
        """For a summary.json; α itself is there already."""
        margins = {f"{alpha:g}": round(margin, 6) for alpha, margin in self.margins.items()}
        return {"floor": self.floor, "choosing_digest": self.choosing_digest, "margins": margins}

    def __str__(self) -> str:
        tried = ", ".join(f"{alpha:g}: {100 * margin:+.1f}" for alpha, margin in self.margins.items())
        on = f"chosen on images of their own (points above the floor at each α tried: {tried})"
        if self.alpha == 0:
            return f"strength auto: α = 0, the untouched model: no strength above 0 keeps {self.floor}, {on}"
        return f"strength auto: α = {self.alpha:g} keeps {self.floor}, {on}"


def choose_strength(
    run_dir: str | Path,
    benchmark: Benchmark,
    out_dir: str | Path,
    settings: Settings,
    floor: Floor,
    *,
    baselines: str | Path,
    say: Say | None = None,
) -> ChosenStrength:
    """Find the largest strength that keeps the floor on the choosing part of each dataset other than id.

    What was evaluated on the way is in OUT_DIR/strength/auto/choosing/<α>, so the same call again reads it.
    """
    table = Benchmark(benchmark.name, tuple(row for row in benchmark.rows if row.group != "id" and row.in_mean))
    if not table.rows:
        raise ConfigError(
            f"strength=auto: benchmark {benchmark.name} has no dataset of a group other than id, so nothing can be "
            "kept or lost: add some, or name one that has"
        )
    table = table.part("choosing")
    source, folder = find_run(run_dir), Path(out_dir) / STRENGTHS / AUTO / "choosing"

    def summary(job: EvalJob, untouched: Summary | None, facts: Mapping[str, Any] | None) -> Summary:
        [own] = evaluate_jobs([job], table, settings, say=say)
        return own.outcome(table, untouched, facts).summary

    base = load_base(source)
    untouched = summary(job_at(base, source, 0, _baselines(baselines, source, "choosing")), None, None)
    between = Between.of(base, load_run(run_dir))

    def margin(alpha: float) -> float:
        job = job_at(between.at(alpha), source, alpha, folder / f"{alpha:g}")
        return floor.margin(summary(job, untouched, {"strength": {"alpha": alpha}}))

    alpha, margins = strongest(margin, floor.of_untouched)
    return ChosenStrength(alpha, str(floor), _digest(untouched), margins)


def evaluate_auto(
    run_dir: str | Path,
    benchmark: Benchmark,
    out_dir: str | Path,
    settings: Settings,
    floor: Floor,
    *,
    baselines: str | Path,
    say: Say | None = None,
) -> tuple[ChosenStrength, Outcome | None]:
    """Choose a strength and evaluate the model at it on the images it was not chosen on, into OUT_DIR/strength/auto.

    Returns:
        The choice, and the results; no results where α is 0.
    """
    chosen = choose_strength(run_dir, benchmark, out_dir, settings, floor, baselines=baselines, say=say)
    if chosen.alpha == 0:
        return chosen, None
    outcome = evaluate_at(
        run_dir,
        chosen.alpha,
        benchmark.part("reporting"),
        Path(out_dir) / STRENGTHS / AUTO,
        settings,
        baselines=_baselines(baselines, find_run(run_dir), "reporting"),
        facts=chosen.facts,
        say=say,
    )
    return chosen, outcome


def _baselines(folder: str | Path, source: RunSource, part: str) -> Path:
    return Path(folder) / source.base_digest[:16] / part


def _digest(summary: Summary) -> str:
    content = {key: each["dataset_digest"] for key, each in summary["datasets"].items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
