"""Walk a benchmark's table over all ranks: one result file per dataset, finished ones skipped, then the summary."""

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
from pipeline.model.restore import find_run, load_base, load_run
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
class Job:
    """A merged model and where its results go. `also` are folders where they may already be, `name` is for messages."""

    clip: Model
    folder: Path
    name: str = ""
    also: tuple[Path, ...] = ()


@dataclass
class Walk:
    """The models that go over the table together, and what they have by now."""

    jobs: Sequence[Job]
    settings: Settings
    ranks: Ranks
    say: Say
    skip_done: bool = True
    subjects: list[Subject] = field(default_factory=list)
    results: list[dict[str, Result]] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)
    # Of the rows that a model was asked for and cannot answer, by key.
    left_out: list[dict[str, str]] = field(default_factory=list)


def evaluate(
    clip: Model,
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
    not read again. The summary covers all finished rows, also those that `datasets` leaves out now. `clip.model` is
    moved to the device and stays in eval mode. Faults of the data raise ConfigError on every rank.
    """
    job = Job(clip, Path(out_dir))
    walk = walk_table([job], benchmark, settings, datasets=datasets, skip_done=skip_done, say=say)
    return finish(walk, 0, benchmark, baseline)


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
) -> Outcome:
    """Evaluate a run's merged model and, in the same pass over the images, its untouched base.

    The base's results are kept in BASELINES/<digest> for all runs beside it; where they are there, it is not run again.
    """
    source = find_run(run_dir, step)
    untouched = Job(load_base(source), Path(baselines) / source.base_digest[:16], "untouched model")
    tuned = Job(dataclasses.replace(load_run(run_dir, step), pretrained=source.label), Path(out_dir))
    walk = walk_table([untouched, tuned], benchmark, settings, datasets=datasets, say=say)
    base = finish(walk, 0, benchmark, None)
    return finish(walk, 1, benchmark, base.summary)


def walk_table(
    jobs: Sequence[Job],
    benchmark: Benchmark,
    settings: Settings,
    *,
    datasets: Sequence[str] | None = None,
    skip_done: bool = True,
    say: Say | None = None,
) -> Walk:
    """Take all models over the rows together: an image is read and decoded once for those that have no result yet."""
    for job in jobs:
        if left := list(blocks(job.clip.model)):
            raise ValueError(f"{len(left)} blocks are not merged ({left[0]}, ..): call merge_adapter first")
    chosen = benchmark.choose(datasets)
    chosen.check_paths()
    ranks = Ranks.current()
    walk = Walk(jobs, settings, ranks, say if say is not None and ranks.rank == 0 else _silent, skip_done)
    walk.subjects = [Subject.of(job.clip, settings) for job in jobs]
    walk.results, walk.skipped, walk.left_out = [{} for _ in jobs], [[] for _ in jobs], [{} for _ in jobs]
    for row in benchmark.rows:
        wanted = row in chosen.rows
        # Rank 0 decides: ranks that see a shared disk at different times would part ways and wait for each other.
        if wanted or ranks.from_first(lambda row=row: is_there(row) and _has_files(jobs, row)):
            _visit(walk, row, wanted)
    if walk.left_out[-1].keys() == {row.key for row in chosen.rows}:
        asked, reasons = jobs[-1].clip.pretrained or jobs[-1].clip.name, walk.left_out[-1].values()
        raise ConfigError(
            f"benchmark {benchmark.name}: {asked} can answer none of its rows: {', '.join(dict.fromkeys(reasons))}"
        )
    return walk


def _has_files(jobs: Sequence[Job], row: Row) -> bool:
    return any((job.folder / f"{row.key}.json").is_file() for job in jobs)


def _visit(walk: Walk, row: Row, wanted: bool) -> None:
    """One row: what is finished is taken, the rest is evaluated if it is wanted."""
    dataset = walk.ranks.together(lambda: open_dataset(row))
    found = walk.ranks.from_first(lambda: [_finished(walk, i, dataset) for i in range(len(walk.jobs))])
    unable = [subject.unable(dataset) for subject in walk.subjects]
    todo = [
        i for i, result in enumerate(found) if wanted and unable[i] is None and (result is None or not walk.skip_done)
    ]
    if todo:
        new = evaluate_dataset([walk.subjects[i] for i in todo], dataset, walk.ranks, walk.settings)
        for i, result in zip(todo, new, strict=True):
            found[i] = result
            if walk.ranks.rank == 0:
                replace_json(walk.jobs[i].folder / f"{row.key}.json", result)
    for i, (job, result) in enumerate(zip(walk.jobs, found, strict=True)):
        name = f"{job.name}: " if job.name else ""
        if result is None:
            if wanted and (reason := unable[i]) is not None:
                walk.left_out[i][row.key] = reason
                walk.say(f"{name}{row.key}: left out, for {reason}")
            continue
        walk.results[i][row.key] = result
        if wanted:
            how = f"in {result['seconds']:.1f} s" if i in todo else "(finished before, skipped)"
            walk.say(f"{name}{row.key}: {_shown(result)} {how}")
            walk.skipped[i] += [] if i in todo else [row.key]


def _finished(walk: Walk, i: int, dataset: Dataset) -> Result | None:
    """The result of model i that lies in one of its folders, if it still holds; taken over into its own folder."""
    job, known = walk.jobs[i], walk.subjects[i].identity(dataset, walk.settings)
    own, *others = [folder / f"{dataset.row.key}.json" for folder in (job.folder, *job.also)]
    if (result := finished_result(own, known)) is not None:
        return result
    result = next((each for file in others if (each := finished_result(file, known)) is not None), None)
    if result is not None:
        replace_json(own, result)
    return result


def finish(
    walk: Walk, i: int, benchmark: Benchmark, baseline: Summary | None, facts: Mapping[str, Any] | None = None
) -> Outcome:
    """Write the summary of model i, with what else is known of the model, and give its outcome."""
    answered = benchmark.without(walk.left_out[i])
    known = _model_facts(walk.subjects[i], walk.settings) | dict(facts or {})
    summary = summarise(answered, walk.results[i], known, baseline)
    if walk.ranks.rank == 0:
        write_summary(walk.jobs[i].folder, summary)
    return Outcome(walk.results[i], summary, walk.skipped[i])


def _shown(result: Result) -> str:
    return f"{result['metric']} {100 * result['value']:.2f} of {result['n']} images"


def _silent(_: str) -> None:
    pass


def _model_facts(subject: Subject, settings: Settings) -> dict[str, Any]:
    return {
        "model": subject.clip.name,
        "pretrained": subject.clip.pretrained,
        "classifier": isinstance(subject.clip, Vit) and subject.clip.classes is not None,
        "model_digest": subject.digest,
        "base_digest": subject.clip.digest,
        "precision": settings.precision,
        "preprocessing": settings.preprocessing,
        "limit": settings.limit,
    }
