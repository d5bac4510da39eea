"""The command evaluate: from its options to models, settings and a printed table."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import Config, ConfigError, Promote, load_config
from pipeline.data.images import Preprocessing
from pipeline.data.storage.cache import Cache
from pipeline.evaluation.auto_strength import ChosenStrength, evaluate_auto
from pipeline.evaluation.checkpoints import evaluate_checkpoints, format_checkpoints
from pipeline.evaluation.datasets.benchmark import Benchmark, load_benchmark
from pipeline.evaluation.datasets.dataset import Settings, batch_and_workers
from pipeline.evaluation.measures.encode import Precision
from pipeline.evaluation.measures.ranks import Ranks, launched_ranks
from pipeline.evaluation.record import track_curve, track_results, track_strength
from pipeline.evaluation.run import Outcome, evaluate, evaluate_run
from pipeline.evaluation.strength import (
    AUTO,
    STRENGTHS,
    Strength,
    evaluate_at,
    evaluate_strength,
    format_curve,
    strength_name,
)
from pipeline.evaluation.summary import Summary, format_summary
from pipeline.model.clip import CONFIG_FILE, is_clip_directory
from pipeline.model.load import Model, load_model
from pipeline.model.restore import check_exists, find_run
from pipeline.runs.results import STRENGTH_FILE
from pipeline.runs.run import is_run
from pipeline.runs.sweep import BASELINES, TRIALS, is_sweep
from pipeline.selection.floor import Floor


@dataclass(frozen=True)
class EvalRequest:
    """Options of an evaluation; None: from the run's config, or a default.

    Attributes:
        strength: several strengths give a curve; a single one, or "auto", gives a model.
    """

    benchmark: str | Path | None = None
    root: str | Path | None = None
    out: str | Path | None = None
    datasets: Sequence[str] | None = None
    limit: int | None = None
    device: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    pretrained: str | None = None
    precision: Precision | None = None
    preprocessing: Preprocessing = "reference"
    cache: str | None = None
    strength: Sequence[Strength] | None = None
    floor: float | None = None
    checkpoints: bool = False

    def settings(self, config: Config | None) -> Settings:
        device, run = find_device(self.device), None if config is None else config.eval
        batch, workers = (None, None) if run is None else (run.batch_size, run.workers)
        batch, workers = self.batch_size or batch, workers if self.workers is None else self.workers
        batch, workers = batch_and_workers(device, batch, workers)
        return Settings(
            device=device,
            batch_size=batch,
            workers=workers,
            precision=self.precision or ("fp32" if run is None else run.precision),
            preprocessing=self.preprocessing,
            limit=self.limit,
            cache=Cache.named(self.cache or (None if run is None else run.cache)),
        )

    def table(self, config: Config | None) -> Benchmark:
        name, root = self.benchmark, self.root
        if config is not None and name is None:
            name = config.eval.benchmark
        if name is None:
            which = "" if config is None else ", and the run's config has no eval.benchmark"
            raise ConfigError(f"benchmark: none given{which}; name a benchmark")
        table = load_benchmark(name, config.eval.root if config is not None and root is None else root)
        # The config's datasets belong to its own benchmark.
        own = config is not None and self.benchmark is None and self.datasets is None
        return table.choose(config.eval.datasets) if config is not None and own else table


def evaluate_command(run_or_model: str | Path, options: EvalRequest) -> int:
    """Evaluate a run, or a plain model by name or directory, on a benchmark and print the table.

    For a run, benchmark, batch size and workers default to its config, and results go to RUN/eval. It is compared with
    its untouched base, whose own results are kept in OUT/baselines/<digest> for all runs in OUT.

    Returns:
        The exit code: 1 if no strength above 0 keeps the floor.
    """
    check_exists(run_or_model)
    if not is_run(run_or_model):
        if options.strength is not None:
            raise ConfigError(f"strength: {run_or_model} is not a run, and strengths need a run and its untouched base")
        if options.checkpoints:
            raise ConfigError(f"checkpoints: {run_or_model} is not a run, so it has none")
        table = options.table(None)
        with launched_ranks() as ranks:
            _plain_model(str(run_or_model), table, options, ranks)
        return 0
    run = Path(run_or_model)
    config = _config_of(run, options)
    table = options.table(config)
    if options.checkpoints and options.strength is not None:
        raise ConfigError("checkpoints and strength: one at a time")
    kind = _checkpoints if options.checkpoints else _run if options.strength is None else _strength
    with launched_ranks() as ranks:
        return kind(run, config, table, options, ranks)


def evaluate_model(
    run_or_model: str | Path,
    benchmark: str | Path | None = None,
    *,
    pretrained: str | None = None,
    root: str | Path | None = None,
    out: str | Path | None = None,
    datasets: Sequence[str] | None = None,
    limit: int | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    precision: Precision | None = None,
) -> Summary:
    """Evaluate a run or a plain model on a benchmark; `selora evaluate` without the printed table.

    Args:
        run_or_model: directory of a run, or a model by the name that `model.name` accepts.
        benchmark: name or file of a benchmark; None: the one in the run's config.
        pretrained: open_clip tag or weights file of a plain model.
        root: directory or URL of the benchmark's datasets; None: the root in its file.
        out: directory for the results; None: RUN/eval, or eval/MODEL.
        datasets: keys of the datasets to evaluate; None: all.
        limit: number of images of each dataset, evenly spaced; None: all.
        device: "cpu", "cuda" or "cuda:1"; None: a GPU if there is one.
        batch_size: images per forward pass; None: as in the run's config, or 64, on a GPU 512.
        workers: decoding processes; None: as in the run's config, or 2, on a GPU up to 12.
        precision: of the activations; None: as in the run's config, or fp32.

    Returns:
        The content of summary.json: means and changes by group, values by dataset (shares, not percent), forgetting.

    Raises:
        ConfigError: a wrong argument, or faults of the data; the message names all of them.
    """
    options = EvalRequest(
        benchmark=benchmark,
        root=root,
        out=out,
        datasets=datasets,
        limit=limit,
        device=device,
        batch_size=batch_size,
        workers=workers,
        pretrained=pretrained,
        precision=precision,
    )
    check_exists(run_or_model)
    if not is_run(run_or_model):
        table = options.table(None)
        with launched_ranks():
            return _plain_results(str(run_or_model), table, options)[0].summary
    config = _config_of(Path(run_or_model), options)
    table = options.table(config)
    with launched_ranks() as ranks:
        return _run_results(Path(run_or_model), config, table, options, ranks)[0].summary


def _config_of(run: Path, options: EvalRequest) -> Config:
    if options.pretrained is not None:
        raise ConfigError("pretrained: a run brings its own weights; give it for a plain model only")
    return load_config(run / "config.yaml", [])


def _plain_model(name: str, table: Benchmark, options: EvalRequest, ranks: Ranks) -> None:
    outcome, folder = _plain_results(name, table, options)
    if ranks.rank == 0:
        sys.stdout.write(format_summary(outcome.summary) + f"\nresults in {folder}\n")


def _plain_results(name: str, table: Benchmark, options: EvalRequest) -> tuple[Outcome, Path]:
    model = load_plain(name, options.pretrained)
    folder = Path(options.out) if options.out is not None else Path("eval") / _slug(model)
    return evaluate(model, table, folder, options.settings(None), datasets=options.datasets, say=progress), folder


def _run(run: Path, config: Config, table: Benchmark, options: EvalRequest, ranks: Ranks) -> int:
    outcome, folder = _run_results(run, config, table, options, ranks)
    if ranks.rank == 0:
        sys.stdout.write(format_summary(outcome.summary) + f"\nresults in {folder}\n")
    return 0


def _run_results(
    run: Path, config: Config, table: Benchmark, options: EvalRequest, ranks: Ranks
) -> tuple[Outcome, Path]:
    """The results of a run and their folder; complete results in the run's own folder are also tracked."""
    folder, baselines = places(run, options)
    settings = options.settings(config)
    outcome = evaluate_run(run, table, folder, settings, baselines=baselines, datasets=options.datasets, say=progress)
    if ranks.rank == 0 and options.out is None and options.limit is None:
        track_results(run, config, find_run(run).step, outcome.results, outcome.summary)
    return outcome, folder


def _strength(run: Path, config: Config, table: Benchmark, options: EvalRequest, ranks: Ranks) -> int:
    strengths = tuple(options.strength or ())
    if len(strengths) != 1:
        return _curve(run, config, table, options, ranks)
    [strength] = strengths
    rule = config.promote if options.floor is None else Promote(min_kept=options.floor)
    chosen, outcome = at_strength(run, strength, rule, config, table, options)
    if ranks.rank == 0:
        lines = [] if outcome is None else [format_summary(outcome.summary)]
        lines += [] if chosen is None else [str(chosen)]
        lines += [f"results in {places(run, options)[0] / STRENGTHS / strength_name(strength)}"]
        sys.stdout.write("\n".join(lines) + "\n")
        if outcome is not None and options.out is None and options.limit is None:
            track_strength(run, config, strength_name(strength))
    return 0 if outcome is not None else 1


def at_strength(
    run: Path, strength: Strength, rule: Promote, config: Config, table: Benchmark, options: EvalRequest
) -> tuple[ChosenStrength | None, Outcome | None]:
    """Evaluate a run's model at a strength; finished results are reused.

    Args:
        strength: in (0, 1], or "auto": the largest that keeps the floor in `rule`.

    Returns:
        How the strength was chosen (None if it was given), and the results (None if "auto" found 0).
    """
    folder, baselines = places(run, options)
    settings = options.settings(config)
    if strength == AUTO:
        floor = Floor.of(rule)
        chosen_table = table.choose(options.datasets)
        return evaluate_auto(run, chosen_table, folder, settings, floor, baselines=baselines, say=progress)
    if isinstance(strength, str) or not 0 < strength <= 1:
        raise ConfigError(
            f"strength: {strength!r} should be a number above 0 (untouched), 1 (fine-tuned) at most, or auto"
        )
    outcome = evaluate_at(
        run,
        strength,
        table,
        folder / STRENGTHS / strength_name(strength),
        settings,
        baselines=baselines / find_run(run).base_digest[:16],
        also=(folder,),
        datasets=options.datasets,
        say=progress,
    )
    return None, outcome


def _curve(run: Path, config: Config, table: Benchmark, options: EvalRequest, ranks: Ranks) -> int:
    if AUTO in (options.strength or ()):
        raise ConfigError("strength: auto is a single strength; a curve consists of numbers")
    folder, baselines = places(run, options)
    curve = evaluate_strength(
        run,
        table,
        folder,
        options.settings(config),
        baselines=baselines,
        alphas=[float(alpha) for alpha in options.strength or ()],
        datasets=options.datasets,
        say=progress,
    )
    if ranks.rank == 0:
        sys.stdout.write(format_curve(curve) + f"\nresults in {folder}\n")
        if options.out is None and options.limit is None and options.datasets is None:
            track_curve(run, config, folder / STRENGTH_FILE, curve)
    return 0


def _checkpoints(run: Path, config: Config, table: Benchmark, options: EvalRequest, ranks: Ranks) -> int:
    folder, baselines = places(run, options)
    settings = options.settings(config)
    comparison, best = evaluate_checkpoints(
        run, table, folder, settings, baselines=baselines, datasets=options.datasets, say=progress
    )
    if ranks.rank == 0:
        lines = [format_checkpoints(comparison), format_summary(best.summary), f"results in {folder}"]
        sys.stdout.write("\n\n".join(lines) + "\n")
    return 0


def places(run: Path, options: EvalRequest) -> tuple[Path, Path]:
    """Folders for the results of the run and of its untouched base."""
    if options.out is not None:
        return Path(options.out), Path(options.out) / "baselines"
    folder = run.absolute().parent
    # The trials of a sweep share one folder, a level up.
    return run / "eval", (folder.parent if is_sweep(folder.parent) and folder.name == TRIALS else folder) / BASELINES


def load_plain(name: str, pretrained: str | None) -> Model:
    """A model by its name, `local-dir:`, `hf-hub:`, `hf:`, `timm:`, or as a directory of open_clip or transformers."""
    folder = Path(name)
    if folder.is_dir():
        if not is_clip_directory(folder):
            raise ConfigError(f"{folder}: neither a run (no config.yaml) nor an open_clip model (no {CONFIG_FILE})")
        name = f"local-dir:{folder}"
    return load_model(name, pretrained)


def _slug(model: Model) -> str:
    name = model.name.removeprefix("timm:").removeprefix("local-dir:").removeprefix("hf-hub:")
    parts = [Path(name).name if Path(name).is_absolute() else name, model.pretrained and Path(model.pretrained).name]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part)).strip("-")


def find_device(name: str | None) -> torch.device:
    """The named device; without a name this rank's GPU, or the CPU if there is none."""
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


def progress(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
