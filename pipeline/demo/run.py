"""`selora demo`: from photos to a registered model in one command, on embedded images and an embedded CLIP.

A sweep on Ray trains and evaluates the trials, the report shows gain against share kept, the best trade-off becomes
champion in the registry, and a new process applies it to photos that it has not seen.
Every stage runs the code of a user command, which is printed with it. A second call continues.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import Config, ConfigError, load_config
from pipeline.demo.assets import BENCHMARK, FINETUNE, GRID, MODEL, asset, unpack
from pipeline.demo.show import MethodResult, table
from pipeline.runs.results import EVAL, has_summary, read_summary
from pipeline.selection.ranking import point_of
from pipeline.tracking.mlflow.uris import sqlite_uri

NAME = "selora-demo"
T = TypeVar("T")


def demo(out: Path, seed: int = 0) -> Path:
    """Run all stages below `out`; a second call continues. Returns the path of the report.

    Raises ConfigError if a trial failed; the results of the others stay, and the same call continues.
    """
    from pipeline.handoff.promote import promote
    from pipeline.report.run import report_sweep
    from pipeline.tuning.grid import load_grid
    from pipeline.tuning.sweep import sweep

    out = out.absolute()
    unpack(out / "data", "clothing_train.tar.gz", "reference.tar.gz", "eval.tar.gz")
    config, grid = demo_config(out, seed), load_grid(asset(GRID))
    # Two small trainings in parallel need one thread per worker, or they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcome = _stage("sweep", sweep_command(out, seed), lambda: sweep(config, grid, retry_failed=True))
    if not outcome.complete:
        raise KeyboardInterrupt
    print(table(read_rows(outcome.directory)) + "\n")
    if outcome.failed:
        reasons = (f"{name}: {outcome.trials[name].error}" for name in outcome.failed)
        raise ConfigError("\n".join([*reasons, "the same command repeats the failed trials"]))
    page = _stage(
        "report",
        shlex.join(["selora", "report", str(outcome.directory)]),
        lambda: report_sweep(outcome.directory, config),
    )
    promoted = _stage(
        "promotion",
        shlex.join(["selora", "promote", str(outcome.directory), "--name", NAME, "--champion"]),
        lambda: promote(outcome.directory, NAME, champion=True),
    )
    print(f"{promoted}\n")
    if promoted.version is None:
        raise ConfigError(f"{outcome.directory}: the promotion rule in {asset(FINETUNE)} does not hold")
    _predict(out, promoted.uri)
    print(f"report: {page}\ntracked: mlflow ui --backend-store-uri {shlex.quote(promoted.uri)}")
    return page


def demo_config(out: Path, seed: int) -> Config:
    """The config of all trials."""
    return load_config(asset(FINETUNE), _changes(out, seed))


def sweep_command(out: Path, seed: int) -> str:
    """The command that runs the demo's sweep."""
    files = str(asset(FINETUNE)), str(asset(GRID))
    return shlex.join(["selora", "sweep", *files, *_changes(out, seed), "--retry-failed"])


def _changes(out: Path, seed: int) -> list[str]:
    """What the demo changes in its config, as on the command line; the seed is part of the sweep's name."""
    changes = {
        "name": "clothes" if seed == 0 else f"clothes_seed{seed}",
        "out": out,
        "seed": seed,
        "model.name": f"local-dir:{asset(MODEL)}",
        "data.train": out / "data" / "clothing_train",
        "keep.images": out / "data" / "reference",
        "eval.benchmark": out / "data" / BENCHMARK,
        "tracking.experiment": NAME,
        "tracking.uri": sqlite_uri(out / "mlflow.db"),
    }
    return [f"{key}={value}" for key, value in changes.items()]


def read_rows(sweep_dir: Path) -> list[MethodResult]:
    """The untouched model, then every trial that has results, in the order of the grid."""
    from pipeline.handoff.choice import chosen_run
    from pipeline.runs.sweep import read_sweep, trial_dir

    found = read_sweep(sweep_dir)
    chosen = chosen_run(sweep_dir)[0].name
    rows: list[MethodResult] = []
    for trial in found["trials"]:
        folder = trial_dir(sweep_dir, trial["name"])
        if not has_summary(folder / EVAL):
            continue
        summary = read_summary(folder / EVAL)
        if not rows:
            rows.append(_untouched(summary))
        rows.append(_row(trial["label"], summary, _gates(folder), chosen=trial["name"] == chosen))
    return rows


def _untouched(summary: Mapping[str, Any]) -> MethodResult:
    means = {name: found["mean"] - found["change"] for name, found in summary["groups"].items()}
    return MethodResult(
        "untouched", means["id"], means["shift"], means["zero-shot"], means["retrieval"], 1.0, None, None
    )


def _row(label: str, summary: Mapping[str, Any], gates: Mapping[str, Any], *, chosen: bool) -> MethodResult:
    means = {name: found["mean"] for name, found in summary["groups"].items()}
    point = point_of(summary)
    assert point is not None
    return MethodResult(
        label=f"{label} *" if chosen else label,
        id=means["id"],
        shift=means["shift"],
        zero_shot=means["zero-shot"],
        retrieval=means["retrieval"],
        kept=point.kept,
        worst=(point.worst, point.worst_kept),
        active=(sum(gate["open"] for gate in gates.values()), len(gates)) if gates else None,
    )


def _gates(run_dir: Path) -> Mapping[str, Any]:
    from pipeline.model.restore import find_run

    return find_run(run_dir).state["gate_map"] or {}


def _predict(out: Path, uri: str) -> None:
    """Classify photos of the test set in a separate process with the champion from the registry."""
    photos = [os.path.relpath(photo) for photo in _photos(out)]
    command = ["predict", f"models:/{NAME}@champion", *photos, "--uri", uri]
    print(f"== prediction: selora {shlex.join(command)}", file=sys.stderr)
    subprocess.run([sys.executable, "-P", "-m", "pipeline", *command], env=_environment(), check=True)


def _photos(out: Path) -> list[Path]:
    """The first test photo of each class, in files named after the class."""
    from pipeline.data.eval.wds_layout import open_eval_set

    clothes, folder = open_eval_set(out / "data" / "eval" / "clothing"), out / "photos"
    folder.mkdir(exist_ok=True)
    found: dict[int, Path] = {}
    for label, (tar, number) in zip(clothes.labels, clothes.places, strict=True):
        if label not in found:
            found[label] = folder / f"{(clothes.classnames or ())[label]}.webp"
            found[label].write_bytes(clothes.tars[tar].read(number, "webp"))
    return list(found.values())


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _stage(name: str, command: str, work: Callable[[], T]) -> T:
    """Print the equivalent user command and how long it took."""
    started = time.monotonic()
    print(f"== {name}: {command}", file=sys.stderr, flush=True)
    result = work()
    print(f"== {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return result
