"""The largest strength that keeps the floor: chosen on one part of the images, reported on the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, Promote
from pipeline.evaluation.datasets.benchmark import Benchmark
from pipeline.evaluation.datasets.dataset import OpenSets, Settings
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.run import EvalJob, Outcome, Say, evaluate_jobs
from pipeline.evaluation.strength import AUTO, STRENGTHS, job_at, strength_name
from pipeline.evaluation.summary import Summary
from pipeline.model.between import Between
from pipeline.model.restore import Both, find_run, load_both
from pipeline.runs.results import EVAL, reported_at, write_floors
from pipeline.selection.floor import Floor, strongest
from pipeline.selection.frontier import FLOORS


@dataclass(frozen=True)
class ChosenStrength:
    """A strength and the margins by which it was chosen.

    Attributes:
        alpha: 0 if no strength above it keeps the floor.
        floor: in words, as in "promote.min_kept >= 0.95".
        choosing_digest: sha256 over the images it was chosen on.
        margins: strength -> its distance above the floor on these images, for each strength that was tried.
    """

    alpha: float
    floor: str
    choosing_digest: str
    margins: Mapping[float, float]

    @property
    def facts(self) -> dict[str, Any]:
        """Entries for a summary.json, without α."""
        margins = {f"{alpha:g}": round(margin, 6) for alpha, margin in self.margins.items()}
        return {"floor": self.floor, "choosing_digest": self.choosing_digest, "margins": margins}

    def __str__(self) -> str:
        tried = ", ".join(f"{alpha:g}: {100 * margin:+.1f}" for alpha, margin in self.margins.items())
        on = f"chosen on separate images (points above the floor at each α tried: {tried})"
        if self.alpha == 0:
            return f"strength auto: α = 0, the untouched model: no strength above 0 keeps {self.floor}, {on}"
        return f"strength auto: α = {self.alpha:g} keeps {self.floor}, {on}"


def choosing_table(benchmark: Benchmark) -> Benchmark:
    """The choosing part of each dataset other than id; ConfigError if there is no such dataset."""
    rows = tuple(row for row in benchmark.rows if row.group != "id" and row.in_mean)
    if not rows:
        raise ConfigError(
            f"strength=auto: benchmark {benchmark.name} has no dataset of a group other than id, so nothing can be "
            "kept or lost: add some, or name one that has"
        )
    return Benchmark(benchmark.name, rows).part("choosing")


class Strengths:
    """One run's model at any strength, evaluated on both parts of the images; earlier results are reused.

    Results on the choosing part are in OUT_DIR/strength/auto/choosing/<α>.
    """

    def __init__(
        self,
        run_dir: str | Path,
        benchmark: Benchmark,
        out_dir: str | Path,
        settings: Settings,
        *,
        baselines: str | Path,
        say: Say | None = None,
        both: Both | None = None,
    ) -> None:
        self._choosing, self._reporting = choosing_table(benchmark), benchmark.part("reporting")
        self._settings, self._say = replace(settings, opened=settings.opened or OpenSets()), say
        self._source = find_run(run_dir)
        self._baselines = Path(baselines) / self._source.base_digest[:16]
        self._folder = Path(out_dir) / STRENGTHS / AUTO / "choosing"
        self._base, tuned = both or load_both(self._source)
        self._between = Between.of(self._base, tuned)
        self._untouched: dict[str, Summary] = {}
        self._on_choosing: dict[float, Summary] = {}

    def largest(self, floor: Floor) -> ChosenStrength:
        """The largest strength that keeps the floor on the choosing part."""

        def margin(alpha: float) -> float:
            if alpha not in self._on_choosing:
                folder = self._folder / strength_name(alpha)
                self._on_choosing[alpha] = self._at(alpha, self._choosing, "choosing", folder, {}).summary
            return floor.margin(self._on_choosing[alpha])

        alpha, margins = strongest(margin, floor.of_untouched)
        return ChosenStrength(alpha, str(floor), _digest(self._base_on(self._choosing, "choosing")), margins)

    def reported(self, alpha: float, folder: Path, facts: Mapping[str, Any], *also: Path) -> Outcome:
        """The results at a strength on the images that were not used to choose it, written to `folder`."""
        return self._at(alpha, self._reporting, "reporting", folder, facts, *also)

    def _at(
        self, alpha: float, table: Benchmark, part: str, folder: Path, facts: Mapping[str, Any], *also: Path
    ) -> Outcome:
        untouched = self._base_on(table, part)
        job = job_at(self._between.at(alpha), self._source, alpha, folder, also)
        [own] = evaluate_jobs([job], table, self._settings, say=self._say)
        return own.outcome(table, untouched, {"strength": {"alpha": alpha, **facts}})

    def _base_on(self, table: Benchmark, part: str) -> Summary:
        if part not in self._untouched:
            job = EvalJob(self._base, self._baselines / part, "untouched model")
            [own] = evaluate_jobs([job], table, self._settings, say=self._say)
            self._untouched[part] = own.outcome(table, None).summary
        return self._untouched[part]


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
    """Find the largest strength that keeps the floor on the choosing part of each dataset other than id."""
    return Strengths(run_dir, benchmark, out_dir, settings, baselines=baselines, say=say).largest(floor)


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
    """Choose a strength and evaluate the model at it on the other images; results go to OUT_DIR/strength/auto.

    Returns:
        The choice, and the results; no results if α is 0.
    """
    strengths = Strengths(run_dir, benchmark, out_dir, settings, baselines=baselines, say=say)
    chosen = strengths.largest(floor)
    if chosen.alpha == 0:
        return chosen, None
    auto = Path(out_dir) / STRENGTHS / AUTO
    return chosen, strengths.reported(chosen.alpha, auto, chosen.facts, Path(run_dir) / reported_at(chosen.alpha))


def evaluate_floors(
    run_dir: str | Path,
    benchmark: Benchmark,
    settings: Settings,
    floor: float,
    *,
    baselines: str | Path,
    say: Say | None = None,
    both: Both | None = None,
) -> dict[str, Any]:
    """Evaluate a run at a floor and at the report's floors, each at its own strength; results go to RUN/eval.

    Args:
        floor: share kept that decides between the trials of a sweep.
        both: the models of the run, the second of which is changed; None: read them.

    Returns:
        The content of floors.json: for each floor the strength, chosen on the choosing part, with id and kept on the
        other images.
    """
    out_dir = Path(run_dir) / EVAL
    strengths = Strengths(run_dir, benchmark, out_dir, settings, baselines=baselines, say=say, both=both)
    entries, digest = {}, ""
    for each in sorted({floor, *FLOORS}, reverse=True):
        chosen = strengths.largest(Floor.of(Promote(min_kept=each)))
        summary = strengths.reported(chosen.alpha, Path(run_dir) / reported_at(chosen.alpha), {}).summary
        kept, digest = summary["kept"], chosen.choosing_digest
        entries[repr(each)] = {  # every digit: readers look the floor up by its exact value
            "alpha": chosen.alpha,
            "id": summary["groups"]["id"]["mean"],
            "kept": None if kept is None else kept["mean"],
            "margin": chosen.margins.get(chosen.alpha),
        }
    content = {"benchmark": benchmark.name, "floor": floor, "choosing_digest": digest, "floors": entries}
    if Ranks.current().rank == 0:
        write_floors(out_dir, content)
    return content


def _digest(summary: Summary) -> str:
    content = {key: each["dataset_digest"] for key, each in summary["datasets"].items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
