"""Run directories as from training and evaluation, with given numbers, so that no model has to be trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import flatten, load_config, override, to_yaml
from pipeline.evaluation.datasets.benchmark import Benchmark, load_benchmark
from pipeline.evaluation.record import track_results
from pipeline.evaluation.results import Result
from pipeline.evaluation.summary import summarise
from pipeline.files import replace_json
from pipeline.runs.results import SUMMARY_FILE
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


def write_results(
    folder: Path, benchmark: Benchmark, values: Values, untouched: Values | None, classifier: bool = False
) -> dict[str, Any]:
    facts = {"model": "m", "pretrained": None, "base_digest": BASE_DIGEST, "limit": None, "classifier": classifier}
    baseline = None if untouched is None else summarise(benchmark, results_of(benchmark, untouched), facts, None)
    results = results_of(benchmark, values)
    for key, result in results.items():
        replace_json(folder / f"{key}.json", result)
    summary = summarise(benchmark, results, facts, baseline)
    replace_json(folder / SUMMARY_FILE, summary)
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
    number = 72 if config.classifies else 144  # a ViT has no text tower
    is_open = {target: not config.gated or target in active for target in TARGETS[:number] if has_blocks}
    if config.adapter.random_k is not None:
        is_open = dict.fromkeys(TARGETS[: config.adapter.random_k], True)
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
        summary = write_results(directory / "eval", table, values, untouched, config.classifies)
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
            replace_json(
                trials / name / "trial.json", {"status": state, "step": step, "total_steps": 40, "error": error}
            )

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
    replace_json(directory / "sweep.json", {**head, "trials": entries})
    (trials / "baselines").rename(directory / "baselines")
    return directory


@pytest.fixture(scope="session")
def sweep_page(sweep_dir: Path) -> Path:
    from pipeline.report.run import report

    return report(sweep_dir)


VIT = {"model.name": "timm:vit_small_patch16_224.dino", "train.train_rest": "none", "eval.benchmark": "vision"}
KNOWN = {"imagenet100": 0.872}


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return load_benchmark("vision", root=tmp_path_factory.mktemp("sets"))


def write_vit(
    folder: Path, table: Benchmark, name: str, changes: dict[str, Any], own: float, kept: float, active: int = 0,
    target: str = "cifar100",
) -> Path:  # fmt: skip
    """A classifier with this accuracy on its target set and on the source set, and so many open gates."""
    values, open_ones = {target: own, "imagenet100": kept}, TARGETS[72 - active : 72]
    return write_run(name, VIT | changes, folder=folder, table=table, values=values, untouched=KNOWN, active=open_ones)


@pytest.fixture
def make_vit(tmp_path: Path, vision: Benchmark) -> MakeRun:
    return partial(write_vit, tmp_path / "runs", vision)


@pytest.fixture(scope="session")
def vision_page(tmp_path_factory: pytest.TempPathFactory, vision: Benchmark) -> Path:
    """Classifiers on a ViT: what Tables 1, 2 and 4 of the paper have, and a rank that it has not; one has two seeds."""
    from pipeline.report.run import report

    folder = tmp_path_factory.mktemp("vision") / "runs"
    make = partial(write_vit, folder, vision)
    make("linear", {"adapter.kind": "none"}, 0.721, 0.872)
    make("full", {"adapter.kind": "full"}, 0.845, 0.373)
    for rank in (16, 128):
        make(f"lora_r{rank}", {"adapter.rank": rank, "gate.enabled": False}, 0.87 + rank / 9000, 0.862 - rank / 9000)
        for lam, active in ((0.5, 10), (1.0, 5)):
            gates = {"adapter.rank": rank, "gate.lam": lam}
            make(f"r{rank}_l{lam:g}", gates, 0.874 - lam / 120, 0.86 + lam / 150, active)
    make("again", {"adapter.rank": 16, "gate.lam": 1.0, "seed": 1}, 0.861, 0.868, 5)
    make("own_rank", {"adapter.rank": 32, "gate.lam": 1.0}, 0.861, 0.868, 5)
    make("random", {"adapter.rank": 16, "adapter.random_k": 10}, 0.85, 0.861)
    make("hinge", {"adapter.rank": 128, "gate.lam": 1.0, "gate.penalty": "hinge"}, 0.88, 0.862, 16)
    return report(folder)
