"""Comparison of a run's checkpoints: the best on its own data, as reported in the paper, and the last."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.display import text_table
from pipeline.evaluation.datasets.benchmark import Benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.run import EvalJob, Outcome, Say, evaluate_jobs, evaluate_run
from pipeline.files import replace_json
from pipeline.model.restore import RunSource, find_run, load_run
from pipeline.runs.results import CHECKPOINTS_FILE
from pipeline.runs.run import kept_steps

# Models in memory at once; more of them take turns over the images, which the cache then has decoded.
AT_ONCE = 8

Comparison = dict[str, Any]


def evaluate_checkpoints(
    run_dir: str | Path,
    benchmark: Benchmark,
    out_dir: str | Path,
    settings: Settings,
    *,
    baselines: str | Path,
    datasets: Sequence[str] | None = None,
    say: Say | None = None,
) -> tuple[Comparison, Outcome]:
    """Evaluate every kept checkpoint on the rows of group id, and the best of them on all rows.

    The best has the highest id mean; of equals it is the earlier one. It is chosen and measured on the same images, so
    its number is too optimistic; the paper reports it nevertheless, so the last one is reported as well. Writes
    OUT_DIR/checkpoints.json and OUT_DIR/checkpoints/<step>/, from which an interrupted call continues; returns the
    comparison and the results of the best. ConfigError if the benchmark has no row of group id.
    """
    chosen, out = benchmark.choose(datasets), Path(out_dir)
    own = Benchmark(benchmark.name, tuple(row for row in chosen.rows if row.group == "id"))
    if not own.rows:
        raise ConfigError(f"benchmark {benchmark.name}: checkpoints are compared by group id, and no row is of it")
    sources = [find_run(run_dir, step) for step in kept_steps(find_run(run_dir).checkpoint.parent.parent)]
    found: list[dict[str, Any]] = []
    for some in _in_turns(sources):
        jobs = [_job(run_dir, source, out) for source in some]
        evaluations = evaluate_jobs(jobs, own, settings, say=say)
        found += [_line(source, each.outcome(own, None)) for source, each in zip(some, evaluations, strict=True)]
    best = max(found, key=lambda line: (line["id"], -line["step"]))
    folder = out / "checkpoints" / str(best["step"])
    outcome = evaluate_run(
        run_dir, benchmark, folder, settings, baselines=baselines, datasets=datasets, say=say, step=best["step"]
    )
    comparison = {"benchmark": benchmark.name, "checkpoints": found, "best": best["step"], "last": found[-1]["step"]}
    if Ranks.current().rank == 0:
        replace_json(out / CHECKPOINTS_FILE, comparison)
    return comparison, outcome


def _in_turns(sources: Sequence[RunSource]) -> Iterator[Sequence[RunSource]]:
    return (sources[start : start + AT_ONCE] for start in range(0, len(sources), AT_ONCE))


def _job(run_dir: str | Path, source: RunSource, out: Path) -> EvalJob:
    model = dataclasses.replace(load_run(run_dir, source.step), pretrained=source.label)
    return EvalJob(model, out / "checkpoints" / str(source.step), f"step {source.step}")


def _line(source: RunSource, outcome: Outcome) -> dict[str, Any]:
    gates = source.state["gate_map"] or {}
    return {
        "step": source.step,
        "id": outcome.summary["groups"]["id"]["mean"],
        "active_blocks": sum(gate["open"] for gate in gates.values()),
        "blocks": len(gates),
    }


def format_checkpoints(comparison: Comparison) -> str:
    """A line for each checkpoint, in percent, the best and the last marked."""
    marks = {comparison["last"]: "last", comparison["best"]: "best"}
    if comparison["best"] == comparison["last"]:
        marks = {comparison["best"]: "best and last"}
    lines = []
    for line in comparison["checkpoints"]:
        blocks = f"{line['active_blocks']} of {line['blocks']}" if line["blocks"] else "no blocks"
        lines.append((str(line["step"]), f"{100 * line['id']:.2f}", blocks, marks.get(line["step"], "")))
    return text_table(("step", "id", "active blocks", ""), lines, left=0)
