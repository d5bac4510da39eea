"""The disturbed commands: inputs of each, checks after every fault, and the expected result."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
DATASET, OTHER, LIMIT = "clothing", "clipart", "96"


@dataclass(frozen=True)
class Story:
    """A command in a box: a directory of its own with copies of what it changes."""

    name: str
    inputs: tuple[str, ...]  # of the base, copied into each box
    argv: Callable[[Path, Path], list[str]]  # (base, box)
    whole: Callable[[Path], list[str]]  # faults of what is there, at any moment
    result: Callable[[Path], Result]  # of a box whose command came to its end


def base_of(folder: Path, run: Callable[[list[str]], None]) -> Path:
    """Inputs for all stories, made once; `run` runs one command to its end."""
    from PIL import Image

    from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack

    unpack(folder / "data", "clothing_train.tar.gz", "eval.tar.gz")
    for label in "ab":
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        for number in range(60):
            Image.new("RGB", (48, 48), (number * 4, 60 * "ab".index(label), 90)).save(
                folder / "images" / label / f"{number}.png"
            )
    settings = {
        "model.name": f"local-dir:{asset(MODEL)}",
        "data.train": str(folder / "data" / "clothing_train"),
        "data.streams": 8,
        "data.workers": 1,
        "eval.benchmark": str(folder / "data" / "benchmark.yaml"),
        "eval.datasets": [DATASET, OTHER],
        "adapter.rank": 4,
        "train.steps": 40,
        "train.global_batch_size": 16,
        "train.checkpoint_every": 5,
        "train.log_every": 1,
        "train.gates_every": 10,
        "train.warmup_steps": 2,
    }
    lines = [f"base: {asset(FINETUNE)}", *(f"{key}: {json.dumps(value)}" for key, value in _nested(settings).items())]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "sweep.yaml").write_text(
        f"base: {folder / 'config.yaml'}\ntrain: {{steps: 12, checkpoint_every: 3}}\neval: {{datasets: [{DATASET}]}}\n",
        encoding="utf-8",
    )
    (folder / "grid.yaml").write_text(
        "grid: {rank: [2, 4]}\nresources: {workers: 1, cpus_per_worker: 0.5, eval_cpus: 0.5, concurrent: 2}\n",
        encoding="utf-8",
    )
    run(["train", str(folder / "config.yaml"), f"out={folder}", "name=run", "train.steps=6"])
    run(["evaluate", str(folder / "run")])
    shutil.copy(folder / "mlflow.db", folder / "store.db")
    return folder


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def _address(box: Path) -> str:
    from pipeline.tracking.mlflow.uris import sqlite_uri

    return sqlite_uri(box / "store.db")


def _uri(box: Path) -> str:
    return f"tracking.uri={_address(box)}"


def _train(base: Path, box: Path) -> list[str]:
    return ["train", str(base / "config.yaml"), f"out={box}", "name=new", _uri(box)]


def _train_whole(box: Path) -> list[str]:
    """`latest` names a checkpoint whose files are all there and can be read."""
    from safetensors.torch import load_file

    from pipeline.training.checkpoint import latest_checkpoint

    found = latest_checkpoint(box / "new")
    if found is not None:
        for name in ("trainable", "optimizer"):
            load_file(found.path / f"{name}.safetensors")
    return []


def _train_result(box: Path) -> Result:
    from pipeline.tracking.mlflow.sync import sync
    from pipeline.training.checkpoint import latest_checkpoint

    report = sync(box / "new")
    found = latest_checkpoint(box / "new")
    assert found is not None
    rows = _metric_rows(box, report.run_id)
    return {
        "step": found.step,
        "weights": _weights(box / "new"),
        "losses": [row for row in rows if row[0] == "train/loss"],
        "twice": len(rows) - len({row[:2] for row in rows}),
        "pending": report.pending,
        "runs": _count(box, "select count(*) from runs where lifecycle_stage = 'active' and name = 'new'"),
    }


def _weights(run: Path) -> str:
    from safetensors.torch import load_file

    from pipeline.training.checkpoint import latest_checkpoint

    found = latest_checkpoint(run)
    assert found is not None
    tensors = load_file(found.path / "trainable.safetensors")
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def _sync(_: Path, box: Path) -> list[str]:
    return ["track", "sync", str(box / "run"), "--uri", _address(box), "--full"]


def _sync_result(box: Path) -> Result:
    runs = _count(box, "select count(*) from runs where lifecycle_stage = 'active'")
    rows = _query(box, "select key, step, value from metrics where key not like 'system/%' order by key, step")
    return {"runs": runs, "rows": rows, "twice": len(rows) - len({row[:2] for row in rows})}


def _pack(base: Path, box: Path) -> list[str]:
    again = ["--force"] if (box / "shards").exists() else []
    return ["pack", str(base / "images"), str(box / "shards"), "--samples-per-shard", "16", "--workers", "2", *again]


def _pack_whole(box: Path) -> list[str]:
    """An index.json stands only with tars that are as it says."""
    from pipeline.data.shards.verify import verify

    return [] if not (box / "shards" / "index.json").exists() else [str(one) for one in verify(box / "shards").faults]


def _evaluate(_: Path, box: Path) -> list[str]:
    return ["evaluate", str(box / "run"), "--datasets", DATASET, OTHER, "--limit", LIMIT, "--out", str(box / "eval")]


def _json_whole(folder: str) -> Callable[[Path], list[str]]:
    def look(box: Path) -> list[str]:
        for path in (box / folder).rglob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        return []

    return look


def _evaluate_result(box: Path) -> Result:
    summary = json.loads((box / "eval" / "summary.json").read_text(encoding="utf-8"))
    return {"groups": summary["groups"], "digest": summary["model_digest"]}


def _export(_: Path, box: Path) -> list[str]:
    return ["export", str(box / "run"), str(box / "model"), "--to", "open_clip", "--unverified", "--force"]


def _export_whole(box: Path) -> list[str]:
    return [] if not (box / "model").exists() or _digests(box / "model") else ["an export without files"]


def _promote(_: Path, box: Path) -> list[str]:
    rule = ["--rule", "min_gain=-1", "max_forgetting=1"]
    return ["promote", str(box / "run"), "--name", "m", "--uri", _address(box), *rule]


def _promote_result(box: Path) -> Result:
    return {
        "versions": _query(box, "select version, status from model_versions"),
        "aliases": _query(box, "select alias, version from registered_model_aliases"),
        "models": _count(box, "select count(*) from logged_models where lifecycle_stage = 'active'"),
    }


def _digests(folder: Path) -> Result:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _metric_rows(box: Path, run_id: str | None) -> list[tuple[Any, ...]]:
    wanted = "select key, step, value from metrics where run_uuid = ? and key not like 'system/%' order by key, step"
    return _query(box, wanted, run_id)


def _query(box: Path, text: str, *values: Any) -> list[tuple[Any, ...]]:
    with sqlite3.connect(box / "store.db", timeout=60) as connection:
        return connection.execute(text, values).fetchall()


def _count(box: Path, text: str) -> int:
    return int(_query(box, text)[0][0])


def _sweep(base: Path, box: Path) -> list[str]:
    return ["sweep", str(base / "sweep.yaml"), str(base / "grid.yaml"), f"out={box}", "name=new", _uri(box)]


def _sweep_result(box: Path) -> Result:
    """Each trial finished once, with the weights, losses and scores of the undisturbed sweep."""
    from pipeline.runs.sweep import read_state
    from pipeline.tracking.mlflow.sync import sync

    found: Result = {}
    for run in sorted((box / "new" / "trials").iterdir()):
        report = sync(run)
        rows = _metric_rows(box, report.run_id)
        found[run.name] = {
            "status": read_state(run).status,
            "weights": _weights(run),
            "losses": [row for row in rows if row[0] == "train/loss"],
            "twice": len(rows) - len({row[:2] for row in rows}),
            "scores": json.loads((run / "eval" / "summary.json").read_text(encoding="utf-8"))["groups"],
        }
    found["runs"] = _query(box, "select name, count(*) from runs where lifecycle_stage = 'active' group by name")
    return found


def _nothing(_: Path) -> list[str]:
    return []


STORIES = (
    Story("train", ("store.db",), _train, _train_whole, _train_result),
    Story("pack", (), _pack, _pack_whole, lambda box: _digests(box / "shards")),
    Story("evaluate", ("run",), _evaluate, _json_whole("eval"), _evaluate_result),
    Story("export", ("run",), _export, _export_whole, lambda box: _digests(box / "model")),
    Story("promote", ("run", "store.db"), _promote, _nothing, _promote_result),
    Story("track sync", ("run", "store.db"), _sync, _nothing, _sync_result),
    Story("sweep", ("store.db",), _sweep, _nothing, _sweep_result),
)
