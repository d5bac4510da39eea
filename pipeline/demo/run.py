"""`selora demo`: the paper's Figure 1 in miniature, on embedded photos and an embedded CLIP.

Each method is trained and evaluated by the code that a user's own run takes, one process a core. A second call
continues: what is trained or evaluated is not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, load_config
from pipeline.demo.assets import BENCHMARK, FINETUNE, MODEL, asset, unpack
from pipeline.demo.show import Row, draw, record, table
from pipeline.evaluation.choice import kept_share


@dataclass(frozen=True)
class Method:
    """One row of the comparison: a name to show and what it changes in finetune.yaml."""

    key: str
    label: str
    settings: tuple[str, ...]


METHODS = (
    # At 1e-3 full fine-tuning keeps a third of what it knew; at this rate it learns as much as the adapters do.
    Method("full", "full (FLYP)", ("adapter.kind=full", "train.lr=3e-4")),
    Method("lora", "LoRA", ("adapter.kind=lora", "gate.enabled=false")),
    Method("gated_lora", "gated LoRA", ("adapter.kind=lora",)),
    Method("gated_dora", "gated DoRA", ("adapter.kind=dora",)),
)


def demo(out: Path, seed: int = 0) -> list[Row]:
    """Run everything below `out`; print the table, write figure.png and results.json. Returns rows, untouched first."""
    started = time.monotonic()
    out = out.absolute()
    unpack(out / "data", "clothing_train.tar.gz", "eval.tar.gz")
    configs = {method.key: _config(out, method, seed) for method in METHODS}
    workers = max(1, min(len(METHODS), len(os.sched_getaffinity(0))))
    # Each worker is a process of its own with one thread: two small trainings side by side waste nothing on waiting.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    print(f"fine-tuning a small CLIP in {len(METHODS)} ways, {workers} at a time, in {out}", file=sys.stderr)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        base = pool.submit(_evaluate_base, configs[METHODS[0].key], out)
        evaluated = {key: pool.submit(_train_and_evaluate, config, out) for key, config in configs.items()}
        _watch({"untouched model": base, **evaluated}, configs)
        untouched = base.result()
        rows = [_row("untouched", untouched, untouched, {})]
        for method in METHODS:
            state = json.loads(_state(configs[method.key]).read_text())
            rows.append(_row(method.label, evaluated[method.key].result(), untouched, state))
    figure = draw(rows, out / "figure.png")
    record(rows, out, figure)
    print(table(rows))
    print(f"figure: {figure}\ntracked runs: mlflow ui --backend-store-uri sqlite:///{out / 'mlflow.db'}")
    print(f"{time.monotonic() - started:.0f} s")
    return rows


def _config(out: Path, method: Method, seed: int) -> Config:
    changes = [
        f"name={method.key}" if seed == 0 else f"name={method.key}_seed{seed}",
        f"out={out}",
        f"seed={seed}",
        f"model.name=local-dir:{asset(MODEL)}",
        f"data.train={out / 'data' / 'clothing_train'}",
    ]
    return load_config(asset(FINETUNE), changes + list(method.settings))


def _run_dir(config: Config) -> Path:
    return Path(config.out) / config.name


def _state(config: Config) -> Path:
    checkpoints = _run_dir(config) / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip() / "state.json"


def _log(config: Config) -> Any:
    _run_dir(config).mkdir(parents=True, exist_ok=True)
    return redirect_stderr((_run_dir(config) / "log.txt").open("a", buffering=1))


def _settings() -> Any:
    from pipeline.evaluation.dataset import Settings

    return Settings(batch_size=128, workers=0, preprocessing="fast")


def _train_and_evaluate(config: Config, out: Path) -> Mapping[str, Any]:
    from pipeline.evaluation.benchmark import load_benchmark
    from pipeline.evaluation.record import track_results
    from pipeline.evaluation.run import evaluate_run
    from pipeline.training.run import train

    run_dir, benchmark = _run_dir(config), load_benchmark(out / "data" / BENCHMARK)
    with _log(config):
        outcome = train(config)
        found = evaluate_run(run_dir, benchmark, run_dir / "eval", _settings(), baselines=out / "baselines")
        track_results(run_dir, config, outcome.step, found.results, found.summary)
    return found.summary


def _evaluate_base(config: Config, out: Path) -> Mapping[str, Any]:
    from pipeline.evaluation.benchmark import load_benchmark
    from pipeline.evaluation.run import evaluate
    from pipeline.model.clip import load_clip

    clip = load_clip(config.model.name, config.model.pretrained)
    folder = out / "baselines" / clip.digest[:16]
    with _log(config):
        return evaluate(clip, load_benchmark(out / "data" / BENCHMARK), folder, _settings()).summary


def _row(label: str, summary: Mapping[str, Any], untouched: Mapping[str, Any], state: Mapping[str, Any]) -> Row:
    means, before = ({name: group["mean"] for name, group in each["groups"].items()} for each in (summary, untouched))
    kept = kept_share(means, before)
    assert kept is not None, "the demo's benchmark has groups other than id"
    gates = state.get("gate_map") or {}
    return Row(
        label=label,
        id=means["id"],
        shift=means["shift"],
        zero_shot=means["zero-shot"],
        retrieval=means["retrieval"],
        kept=kept,
        active=(sum(gate["open"] for gate in gates.values()), len(gates)) if gates else None,
    )


def _watch(jobs: Mapping[str, Future], configs: Mapping[str, Config]) -> None:
    """Say every few seconds how far each job is, until all are done; the first failure ends the demo at once."""
    told = ""
    while True:
        _, waiting = wait(jobs.values(), timeout=5)
        for future in jobs.values():
            if future.done():
                future.result()
        line = " | ".join(f"{key} {_progress(key, future, configs)}" for key, future in jobs.items())
        if line != told:
            print(line, file=sys.stderr, flush=True)
            told = line
        if not waiting:
            return


def _progress(key: str, future: Future, configs: Mapping[str, Config]) -> str:
    if future.done():
        return "done"
    if key not in configs:
        return "runs" if future.running() else "waits"
    log = _run_dir(configs[key]) / "log.txt"
    if not log.exists():  # the pool calls a job running as soon as it is next in line
        return "waits"
    lines = [line for line in log.read_text().splitlines() if line.startswith("step ")]
    return lines[-1].split(" lr ")[0] if lines else "starts"
