"""Walk a benchmark's table over all ranks: one result file per dataset, finished ones skipped, then the summary."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ConfigError, load_config
from pipeline.data.images import Preprocessing
from pipeline.evaluation.benchmark import Benchmark, load_benchmark
from pipeline.evaluation.dataset import Pass, Settings, evaluate_dataset, identity, open_dataset
from pipeline.evaluation.encode import Encoder, Precision
from pipeline.evaluation.ranks import Ranks, launched_ranks
from pipeline.evaluation.record import track_results
from pipeline.evaluation.results import Result, finished_result, write_json
from pipeline.evaluation.summary import SUMMARY_FILE, Summary, format_summary, summarise
from pipeline.method.adapter import blocks
from pipeline.model.clip import CONFIG_FILE, Clip, load_clip, to_open_clip_state, weights_digest
from pipeline.model.restore import find_run, is_run, load_base, load_run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """Results by dataset key, the summary, and the keys that were already finished."""

    results: dict[str, Result]
    summary: Summary
    skipped: list[str]


def evaluate(
    clip: Clip,
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
    if left := list(blocks(clip.model)):
        raise ValueError(f"{len(left)} blocks are not merged ({left[0]}, ..): call merge_adapter first")
    chosen = benchmark.choose(datasets)
    chosen.check_paths()
    ranks = Ranks.current()
    report = say if say is not None and ranks.rank == 0 else _silent
    digest = weights_digest(to_open_clip_state(clip.model))
    model = clip.model.to(settings.device).eval()
    encoder = Encoder(model, clip.tokenizer, settings.device, settings.precision)
    walk = Pass(clip, encoder, ranks, settings, digest)
    results: dict[str, Result] = {}
    skipped: list[str] = []
    for row in benchmark.rows:
        file = Path(out_dir) / f"{row.key}.json"
        wanted = row in chosen.rows
        # Rank 0 decides: ranks that see a shared disk at different times would part ways and wait for each other.
        if not wanted and not ranks.from_first(lambda row=row, file=file: row.path.is_dir() and file.is_file()):
            continue
        dataset = ranks.together(lambda row=row: open_dataset(row))
        known = identity(walk, dataset)
        result = ranks.from_first(lambda file=file, known=known: finished_result(file, known))
        if wanted and (result is None or not skip_done):
            result = evaluate_dataset(walk, dataset)
            if ranks.rank == 0:
                write_json(file, result)
            report(f"{row.key}: {_shown(result)} in {result['seconds']:.1f} s")
        elif wanted and result is not None:
            skipped.append(row.key)
            report(f"{row.key}: {_shown(result)} (finished before, skipped)")
        if result is not None:
            results[row.key] = result
    summary = summarise(benchmark, results, _model_facts(walk), baseline)
    if ranks.rank == 0:
        write_json(Path(out_dir) / SUMMARY_FILE, summary)
    return Outcome(results, summary, skipped)


def _shown(result: Result) -> str:
    return f"{result['metric']} {100 * result['value']:.2f} of {result['n']} images"


def _silent(_: str) -> None:
    pass


def _model_facts(walk: Pass) -> dict[str, Any]:
    return {
        "model": walk.clip.name,
        "pretrained": walk.clip.pretrained,
        "model_digest": walk.model_digest,
        "base_digest": walk.clip.digest,
        "precision": walk.settings.precision,
        "preprocessing": walk.settings.preprocessing,
        "limit": walk.settings.limit,
    }


def evaluate_command(
    run_or_model: str | Path,
    *,
    benchmark: str | Path | None = None,
    out: str | Path | None = None,
    datasets: Sequence[str] | None = None,
    limit: int | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    pretrained: str | None = None,
    precision: Precision = "fp32",
    preprocessing: Preprocessing = "reference",
) -> int:
    """`selora evaluate`: a run directory, or a plain model by name or directory, on a benchmark; prints the table.

    A run takes benchmark, batch size and workers from its config where they are not given, writes to RUN/eval, and is
    compared with its untouched base, whose own results are kept in OUT/baselines/<digest> for all runs beside it.
    """
    run_or_model = str(run_or_model)
    run = Path(run_or_model) if is_run(run_or_model) else None
    if run is not None and pretrained is not None:
        raise ConfigError("pretrained: a run brings its own weights; give it for a plain model only")
    config = load_config(run / "config.yaml", []) if run is not None else None
    benchmark = benchmark or (config.eval.benchmark if config is not None else None)
    if benchmark is None:
        raise ConfigError("benchmark: none given, and the run's config has no eval.benchmark; name a benchmark file")
    table = load_benchmark(benchmark)
    with launched_ranks() as ranks:
        settings = Settings(
            device=_device(device),
            batch_size=batch_size or (config.eval.batch_size if config is not None else Settings.batch_size),
            workers=workers
            if workers is not None
            else (config.eval.workers if config is not None else Settings.workers),
            precision=precision,
            preprocessing=preprocessing,
            limit=limit,
        )
        if run is None:
            clip = load_plain(run_or_model, pretrained)
            folder = Path(out) if out is not None else Path("eval") / _slug(clip)
            outcome = evaluate(clip, table, folder, settings, datasets=datasets, say=_progress)
        else:
            folder = Path(out) if out is not None else run / "eval"
            baselines = (Path(out) if out is not None else run.absolute().parent) / "baselines"
            outcome = evaluate_run(run, table, folder, settings, baselines=baselines, datasets=datasets, say=_progress)
        if ranks.rank == 0:
            sys.stdout.write(format_summary(outcome.summary) + f"\nresults in {folder}\n")
            if run is not None and config is not None and out is None and limit is None:
                track_results(run, config, find_run(run).step, outcome.results, outcome.summary)
    return 0


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
    """Evaluate a run's merged model, and before it its untouched base unless BASELINES/<digest> holds its results."""
    source = find_run(run_dir, step)
    base_dir = Path(baselines) / source.base_digest[:16]
    base_say = None if say is None else lambda line: say(f"untouched model: {line}")
    base = evaluate(load_base(source), benchmark, base_dir, settings, datasets=datasets, say=base_say)
    clip = dataclasses.replace(load_run(run_dir, step), pretrained=source.label)
    return evaluate(clip, benchmark, out_dir, settings, datasets=datasets, baseline=base.summary, say=say)


def load_plain(name: str, pretrained: str | None) -> Clip:
    """A model by open_clip name, `local-dir:`, `hf-hub:`, or as a directory with open_clip_config.json."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(f"{folder}: neither a run (no config.yaml) nor an open_clip model (no {CONFIG_FILE})")
        name = f"local-dir:{folder}"
    return load_clip(name, pretrained)


def _slug(clip: Clip) -> str:
    name = clip.name.removeprefix("local-dir:").removeprefix("hf-hub:")
    parts = [Path(name).name if Path(name).is_absolute() else name, clip.pretrained and Path(clip.pretrained).name]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part)).strip("-")


def _device(name: str | None) -> torch.device:
    """The named device; without a name this rank's GPU, or the CPU where there is none."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device={name!r}: torch sees no GPU here; use device=cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
