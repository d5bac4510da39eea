"""Several gloo ranks give what one gives, and fail together with the cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings
from pipeline.evaluation.run import evaluate
from pipeline.model.clip import load_clip

# The first scene starts as a launcher starts it, the others inside a group of the caller's. After the fault both ranks
# meet again, which they could not if one of them still waited for the other.
PROGRAM = """
import os
import sys
import torch.distributed as dist
from pipeline.config import ConfigError
from pipeline.evaluation.command import EvalRequest, evaluate_command
model, root = sys.argv[1:]
def scene(name):
    print(f"== {name}", flush=True)
    try:
        request = EvalRequest(benchmark=f"{root}/{name}.yaml", out=f"{root}/{name}", batch_size=8, workers=0)
        evaluate_command(model, request)
    except ConfigError as error:
        print(f"ConfigError: {error}", flush=True)
scene("all")
assert not dist.is_initialized()
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=world)
scene("single")
scene("knn")
scene("broken")
dist.barrier()
dist.destroy_process_group()
"""
WORLD = 2


@dataclass
class TwoRanks:
    """What a run of two ranks left: where the results lie and what each rank said, scene by scene."""

    root: Path
    said: list[dict[str, str]]

    def results(self, name: str) -> dict[str, Any]:
        return read_results(self.root / name)


def read_results(out: Path) -> dict[str, Any]:
    found = {file.name: json.loads(file.read_text()) for file in out.glob("*.json")}
    for result in found.values():
        result.pop("seconds", None)
    return found


def start(rank: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    trained_clip_dir: Path,
    benchmark_file: Path,
    known_set: Path,
    make_classification: Any,
    make_retrieval: Any,
    make_broken: Any,
) -> TwoRanks:
    root = tmp_path_factory.mktemp("two_ranks")
    make_classification(root / "wds_a", n=1, shards=1)
    make_retrieval(root / "wds_b", n=1, shards=1)
    make_broken(root / "wds_c")
    (root / "all.yaml").write_text(f"base: {benchmark_file}\nroot: {benchmark_file.parent}\n")
    (root / "single.yaml").write_text(
        "datasets: [{key: a, group: id, path: wds_a}, {key: b, group: retrieval, path: wds_b}]"
    )
    (root / "knn.yaml").write_text(f"datasets: [{{key: known, group: source, path: {known_set}, neighbours: 5}}]")
    (root / "broken.yaml").write_text("datasets: [{key: c, group: id, path: wds_c}]")
    port = free_port()
    ranks = [start(rank, port, str(trained_clip_dir), str(root)) for rank in range(WORLD)]
    try:
        outputs = [process.communicate(timeout=500)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * WORLD, outputs
    scenes = [dict(part.split("\n", 1) for part in output.split("== ")[1:]) for output in outputs]
    return TwoRanks(root, scenes)


def test_two_ranks_give_the_results_of_one(tmp_path: Path, trained_clip_dir: Path, two_ranks: TwoRanks) -> None:
    clip, table = load_clip(f"local-dir:{trained_clip_dir}"), load_benchmark(two_ranks.root / "all.yaml")
    evaluate(clip, table, tmp_path, Settings(batch_size=8, workers=0))
    one, two = read_results(tmp_path), two_ranks.results("all")
    assert [one[f"{key}.json"]["n"] % WORLD for key in ("ours", "pairs")] == [1, 1]
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name]


def test_two_ranks_share_a_bank(tmp_path: Path, trained_clip_dir: Path, two_ranks: TwoRanks) -> None:
    clip, table = load_clip(f"local-dir:{trained_clip_dir}"), load_benchmark(two_ranks.root / "knn.yaml")
    evaluate(clip, table, tmp_path, Settings(batch_size=8, workers=0))
    one, two = read_results(tmp_path), two_ranks.results("knn")
    assert (one["known.json"]["n"], one["known.json"]["bank"]) == (45, 70)
    assert one == two


def test_only_the_first_rank_speaks_and_prints_the_table(two_ranks: TwoRanks) -> None:
    first, second = two_ranks.said
    assert "mean_recall" in first["all"]
    assert second["all"].strip() == ""


def test_a_rank_without_a_sample_takes_part(two_ranks: TwoRanks) -> None:
    assert [two_ranks.results("single")[f"{key}.json"]["n"] for key in "ab"] == [1, 1]


def test_a_fault_on_one_rank_ends_both_with_its_cause(two_ranks: TwoRanks) -> None:
    for scene in two_ranks.said:
        assert "ConfigError" in scene["broken"]
        assert "s0000011" in scene["broken"]
    assert "on rank 1" in two_ranks.said[0]["broken"]
    assert not list((two_ranks.root / "broken").glob("*.json"))
