"""Run directories as training and evaluation write them, with chosen numbers in them: no model has to be trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import flatten, load_config, override, to_yaml
from pipeline.evaluation.benchmark import Benchmark, load_benchmark
from pipeline.evaluation.record import track_results
from pipeline.evaluation.results import Result, write_json
from pipeline.evaluation.summary import SUMMARY_FILE, summarise
from pipeline.tracking.tracker import Status, open_tracker

BASE_DIGEST = "ab" * 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
TARGETS = [f"{tower}.{layer}.{name}" for tower in ("image", "text") for layer in range(12) for name in PROJECTIONS]
UNTOUCHED = {"clothing": 0.32, "fashion": 0.78, "grocery": 0.46, "emoji": 0.22, "stl10": 0.9, "emoji_names": 0.09}
RECALLS = ("image_retrieval_recall@1", "image_retrieval_recall@5", "text_retrieval_recall@1", "text_retrieval_recall@5")

Values = Mapping[str, float]
MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    path = tmp_path_factory.mktemp("benchmark") / "demo.yaml"
    path.write_text(
        "name: demo\ndatasets:\n"
        "  - {key: clothing, group: id, path: a}\n  - {key: fashion, group: shift, path: b}\n"
        "  - {key: grocery, group: zero-shot, path: c}\n  - {key: emoji, group: zero-shot, path: d}\n"
        "  - {key: stl10, group: zero-shot, path: e, in_mean: false}\n"
        "  - {key: emoji_names, group: retrieval, path: f}\n"
    )
    return load_benchmark(path)


def results_of(benchmark: Benchmark, values: Values) -> dict[str, Result]:
    found = {}
    for row in benchmark.rows:
        if row.key in values:
            value = values[row.key]
            metrics = (
                dict.fromkeys(RECALLS, value) if row.is_retrieval else {"acc1": value, "acc5": min(1, value + 0.1)}
            )
            found[row.key] = {
                "dataset": row.key, "metrics": metrics, "metric": row.metric, "value": value, "chance": 0.05, "n": 100,
                "dataset_digest": f"images of {row.key}",
            }  # fmt: skip
    return found


def write_results(folder: Path, benchmark: Benchmark, values: Values, untouched: Values | None) -> dict[str, Any]:
    facts = {"model": "m", "pretrained": None, "base_digest": BASE_DIGEST, "limit": None}
    baseline = None if untouched is None else summarise(benchmark, results_of(benchmark, untouched), facts, None)
    results = results_of(benchmark, values)
    for key, result in results.items():
        write_json(folder / f"{key}.json", result)
    summary = summarise(benchmark, results, facts, baseline)
    write_json(folder / SUMMARY_FILE, summary)
    return summary


@pytest.fixture
def make_run(tmp_path: Path, benchmark: Benchmark) -> MakeRun:
    """make(name, {"adapter.rank": 8}, values={"clothing": 0.4}, active=[..]) -> a run directory below tmp_path/runs."""
    return partial(write_run, folder=tmp_path / "runs", table=benchmark)


def write_run(
    name: str,
    changes: Mapping[str, Any] | None = None,
    *,
    folder: Path,
    table: Benchmark,
    values: Values | None = None,
    active: Sequence[str] = (),
    steps: int = 40,
    status: Status | None = "FINISHED",
    untouched: Values = UNTOUCHED,
    uri: str | None = None,
) -> Path:
    """A run directory with everything in it that training, evaluation and tracking write, but for the weights."""
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text("data: {train: shards}\ntrain: {steps: 40, global_batch_size: 64}\n")
    place = {"name": name, "out": str(folder), "tracking.uri": uri, "tracking.experiment": "report"}
    place["tracking.enabled"] = uri is not None
    config = override(load_config(directory / "config.yaml"), {**place, **(changes or {})})
    (directory / "config.yaml").write_text(to_yaml(config))
    has_blocks = config.adapter.kind in ("lora", "dora")
    is_open = {target: not config.gated or target in active for target in TARGETS if has_blocks}
    with open_tracker(directory, run_name=name, experiment="report", uri=uri, enabled=uri is not None) as tracker:
        tracker.params(flatten(config))
        for step in range(10, steps + 1, 10):
            scores = {f"gate/{target}": 0.12 if on else 0.15 - step / 500 for target, on in is_open.items()}
            shares = {"adapter/active_share": 1 - 0.9 * step / 40} if config.gated else {}
            tracker.metrics(step, {"train/loss": 5 - step / 40, **shares, **(scores if config.gated else {})})
        if status == "FINISHED":
            gates = {target: {"score": None, "open": on} for target, on in is_open.items()}
            (directory / "gate_map.json").write_text(json.dumps(gates))
            tracker.artifact(directory / "gate_map.json")
        if status is not None:
            tracker.finish(status)
    if values is not None:
        summary = write_results(directory / "eval", table, values, untouched)
        write_results(folder / "baselines" / BASE_DIGEST[:16], table, untouched, None)
        track_results(directory, config, steps, results_of(table, values), summary)
    return directory


GOOD = {"clothing": 0.46, "fashion": 0.70, "grocery": 0.40, "emoji": 0.20, "stl10": 0.88, "emoji_names": 0.08}
FORGETFUL = {"clothing": 0.50, "fashion": 0.40, "grocery": 0.10, "emoji": 0.05, "stl10": 0.60, "emoji_names": 0.01}


def shifted(values: Values, by: float) -> dict[str, float]:
    return {key: value + by for key, value in values.items()}


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that open_clip builds a small model of twelve layers from."""
    folder = tmp_path_factory.mktemp("architecture")
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 12, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 12},
    }
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="session")
def sweep_dir(tmp_path_factory: pytest.TempPathFactory, benchmark: Benchmark, architecture: Path) -> Path:
    """Twelve trials over rank, lambda, kind, gates and seed, not done: one is training, one failed, one waits."""
    directory = tmp_path_factory.mktemp("runs") / "search"
    trials = directory / "trials"
    entries: list[dict[str, Any]] = []

    def add(name: str, changes: dict[str, Any], state: str, error: str | None = None, **written: Any) -> None:
        changes |= {"model.name": f"local-dir:{architecture}"}
        baseline = changes.get("gate.enabled") is False or changes.get("adapter.kind") == "full"
        entry = {"id": f"{len(entries):04d}", "name": name, "label": f"the {name}"}
        entries.append({**entry, "changes": changes, "baseline": baseline})
        if state != "waiting":
            write_run(name, changes, folder=trials, table=benchmark, **written)
            step = written.get("steps", 40)
            write_json(trials / name / "trial.json", {"status": state, "step": step, "total_steps": 40, "error": error})

    some, few = TARGETS[60:72], TARGETS[66:70]
    for rank in (8, 64):
        plain = {"adapter.rank": rank, "gate.enabled": False}
        add(f"lora_r{rank}", plain, "finished", values=shifted(FORGETFUL, rank / 6400))
        for lam, active in ((0.3, some), (1.0, few)):
            values = shifted(GOOD, rank / 6400 - lam / 20)
            add(f"r{rank}_l{lam:g}", {"adapter.rank": rank, "gate.lam": lam}, "finished", values=values, active=active)
    seed = {"adapter.rank": 8, "gate.lam": 1.0, "seed": 1}
    add("r8_seed1", seed, "finished", values=shifted(GOOD, -0.02), active=few)
    dora = {"adapter.kind": "dora", "adapter.rank": 8, "gate.lam": 0.3}
    add("dora", dora, "finished", values=shifted(GOOD, -0.03), active=some)
    add("full", {"adapter.kind": "full"}, "finished", values=FORGETFUL)
    broken = {"adapter.rank": 16, "gate.lam": 0.1}
    add("broken", broken, "failed", "step 12: the loss is not finite", steps=10, status="FAILED")
    add("busy", {"adapter.rank": 16, "gate.lam": 0.3}, "training", steps=20, status=None)
    add("later", {"adapter.rank": 16, "gate.lam": 1.0}, "waiting")
    base = flatten(load_config(trials / "r8_l1" / "config.yaml"))
    head = {"format": "selora-sweep", "version": 1, "name": "search", "digest": "0", "base_config": base, "grid": {}}
    write_json(directory / "sweep.json", {**head, "trials": entries})
    (trials / "baselines").rename(directory / "baselines")
    return directory


@pytest.fixture(scope="session")
def sweep_page(sweep_dir: Path) -> Path:
    from pipeline.report.run import report

    return report(sweep_dir)
