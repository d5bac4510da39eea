"""Evaluate models on a benchmark over all ranks: a result file per dataset, finished ones skipped, then a summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.evaluation.datasets.benchmark import Benchmark, is_there
from pipeline.evaluation.datasets.dataset import Dataset, Settings, open_dataset
from pipeline.evaluation.datasets.rows import Row
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.evaluation.passes import Subject, evaluate_dataset
from pipeline.evaluation.results import Result, finished_result
from pipeline.evaluation.summary import Summary, summarise
from pipeline.files import replace_json
from pipeline.method.adapter import blocks
from pipeline.model.load import Model
from pipeline.model.restore import Both, find_run, load_both
from pipeline.model.vit import Vit
from pipeline.runs.results import write_summary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """Results by dataset key, the summary, and the keys that were already finished."""

    results: dict[str, Result]
    summary: Summary
    skipped: list[str]


@dataclass(frozen=True)
class EvalJob:
    """A merged model and the folder for its results.

    Attributes:
        name: prefix of its messages.
        also: folders that may already hold results of the same model.
    """

    model: Model
    folder: Path
    name: str = ""
    also: tuple[Path, ...] = ()


@dataclass
class Evaluation:
    """The state of one job while the table is evaluated.

    Attributes:
        results: by dataset key.
        skipped: keys of the datasets that were already finished.
        left_out: {dataset key: why this model cannot be evaluated on it}.
    """

    job: EvalJob
    subject: Subject
    settings: Settings
    results: dict[str, Result] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(job: EvalJob, settings: Settings) -> Evaluation:
        if left := list(blocks(job.model.model)):
            raise ValueError(f"{len(left)} blocks are not merged ({left[0]}, ..): call merge_adapter first")
        return Evaluation(job, Subject.of(job.model, settings), settings)

    def finished(self, dataset: Dataset) -> Result | None:
        """A result of the same model and data in one of the job's folders; it is copied into the job's own folder."""
        known = self.subject.identity(dataset, self.settings)
        own, *others = [folder / f"{dataset.row.key}.json" for folder in (self.job.folder, *self.job.also)]
        if (result := finished_result(own, known)) is not None:
            return result
        result = next((each for file in others if (each := finished_result(file, known)) is not None), None)
        if result is not None:
            replace_json(own, result)
        return result

    def outcome(
        self, benchmark: Benchmark, baseline: Summary | None, facts: Mapping[str, Any] | None = None
    ) -> Outcome:
        """Write the summary of the job on rank 0 and return its results.

        Args:
            baseline: summary of the untouched model, to compare with.
            facts: further entries about the model for the summary.
        """
        known = _model_facts(self.subject, self.settings) | dict(facts or {})
        summary = summarise(benchmark.without(self.left_out), self.results, known, baseline)
        if Ranks.current().rank == 0:
            write_summary(self.job.folder, summary)
        return Outcome(self.results, summary, self.skipped)


def evaluate(
    model: Model,
    benchmark: Benchmark,
    out_dir: str | Path,
    settings: Settings,
    *,
    datasets: Sequence[str] | None = None,
    baseline: Summary | None = None,
    skip_done: bool = True,
    say: Say | None = None,
) -> Outcome:
    """Evaluate a merged model on the rows of a benchmark, on every rank of torch.distributed if it is initialised.

    All ranks call it and get the same outcome; rank 0 writes OUT_DIR/<key>.json after each dataset and summary.json at
    the end, and calls `say` with a line per dataset. A dataset with a file of the same model, images and settings is
    not read again. The summary covers all finished rows, also those that `datasets` leaves out now. `model.model` is
    moved to the device and stays in eval mode. Faults of the data raise ConfigError on every rank.
    """
    job = EvalJob(model, Path(out_dir))
    [own] = evaluate_jobs([job], benchmark, settings, datasets=datasets, skip_done=skip_done, say=say)
    return own.outcome(benchmark, baseline)


def evaluate_run(
    run_dir: str | Path,
    benchmark: Benchmark,
    out_dir: str | Path,
    settings: Settings,
    *,
    baselines: str | Path,
    datasets: Sequence[str] | None = None,
    say: Say | None = None,
    step: int | None = None,
    both: Both | None = None,
) -> Outcome:
    """Evaluate a run's merged model and, in the same pass over the images, its untouched base.

    The base's results are kept in BASELINES/<digest> for all runs with the same base and are not computed again.

    both: its two models; None: read them.
    """
    source = find_run(run_dir, step)
    both = both or load_both(source)
    untouched = EvalJob(both.untouched, Path(baselines) / source.base_digest[:16], "untouched model")
    tuned = EvalJob(dataclasses.replace(both.tuned, pretrained=source.label), Path(out_dir))
    base, own = evaluate_jobs([untouched, tuned], benchmark, settings, datasets=datasets, say=say)
    return own.outcome(benchmark, base.outcome(benchmark, None).summary)


def evaluate_jobs(
    jobs: Sequence[EvalJob],
    benchmark: Benchmark,
    settings: Settings,
    *,
    datasets: Sequence[str] | None = None,
    skip_done: bool = True,
    say: Say | None = None,
) -> list[Evaluation]:
    """Evaluate models together: each image is read and decoded once for all that have no result yet. Collective.

    Raises:
        ConfigError: faults of the data, or the last model cannot be evaluated on any row.
    """
    evaluations = [Evaluation.of(job, settings) for job in jobs]
    chosen = benchmark.choose(datasets)
    chosen.check_paths()
    ranks = Ranks.current()
    say = say if say is not None and ranks.rank == 0 else _silent
    for row in benchmark.rows:
        if row in chosen.rows:
            _evaluate_row(evaluations, row, ranks, say, skip_done=skip_done)
        # Rank 0 decides: ranks that read a shared disk at different times could decide differently and wait for each
        # other.
        elif ranks.from_first(lambda row=row: is_there(row) and _has_files(jobs, row)):
            _read_row(evaluations, row, ranks)
    last = evaluations[-1]
    if last.left_out.keys() == {row.key for row in chosen.rows}:
        name, reasons = last.job.model.pretrained or last.job.model.name, dict.fromkeys(last.left_out.values())
        raise ConfigError(
            f"benchmark {benchmark.name}: {name} cannot be evaluated on any of its rows: {', '.join(reasons)}"
        )
    return evaluations


def _has_files(jobs: Sequence[EvalJob], row: Row) -> bool:
    return any((job.folder / f"{row.key}.json").is_file() for job in jobs)


def _read_row(evaluations: Sequence[Evaluation], row: Row, ranks: Ranks) -> Dataset:
    """Open the row's dataset and take over the results that are finished."""
    opened = evaluations[0].settings.opened
    dataset = ranks.together(lambda: open_dataset(row, opened))
    found = ranks.from_first(lambda: [each.finished(dataset) for each in evaluations])
    for each, result in zip(evaluations, found, strict=True):
        if result is not None:
            each.results[row.key] = result
    return dataset


def _evaluate_row(evaluations: Sequence[Evaluation], row: Row, ranks: Ranks, say: Say, *, skip_done: bool) -> None:
    """Evaluate the models that have no result for a row yet."""
    dataset = _read_row(evaluations, row, ranks)
    todo = []
    for each in evaluations:
        reason = each.subject.unable(dataset)
        if row.key in each.results and (skip_done or reason is not None):
            each.skipped.append(row.key)
            say(_line(each, row, "(finished before, skipped)"))
        elif reason is None:
            todo.append(each)
        else:
            each.left_out[row.key] = reason
            say(f"{_prefix(each)}{row.key}: left out, for {reason}")
    if not todo:
        return
    new = evaluate_dataset([each.subject for each in todo], dataset, ranks, todo[0].settings)
    for each, result in zip(todo, new, strict=True):
        each.results[row.key] = result
        if ranks.rank == 0:
            replace_json(each.job.folder / f"{row.key}.json", result)
        say(_line(each, row, f"in {result['seconds']:.1f} s"))


def _line(evaluation: Evaluation, row: Row, how: str) -> str:
    result = evaluation.results[row.key]
    shown = f"{result['metric']} {100 * result['value']:.2f} of {result['n']} images"
    return f"{_prefix(evaluation)}{row.key}: {shown} {how}"


def _prefix(evaluation: Evaluation) -> str:
    return f"{evaluation.job.name}: " if evaluation.job.name else ""


def _silent(_: str) -> None:
    pass


def _model_facts(subject: Subject, settings: Settings) -> dict[str, Any]:
    return {
        "model": subject.model.name,
        "pretrained": subject.model.pretrained,
        "classifier": isinstance(subject.model, Vit) and subject.model.classes is not None,
        "model_digest": subject.digest,
        "base_digest": subject.model.digest,
        "precision": settings.precision,
        "preprocessing": settings.preprocessing,
        "limit": settings.limit,
    }
