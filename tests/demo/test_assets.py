"""The demo's assets: complete, small enough, and as in the recipe."""

from __future__ import annotations

import hashlib
import json
import shlex
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from pipeline.cli import build_parser
from pipeline.config import load_config
from pipeline.data.eval.wds_layout import open_eval_set
from pipeline.data.shards.index import load_index
from pipeline.data.shards.verify import verify
from pipeline.demo.assets import ARCHIVES, BENCHMARK, GRID, MODEL, asset, unpack
from pipeline.demo.recipe import CLOTHING, Picture, archive, captions
from pipeline.demo.run import demo_config, sweep_command
from pipeline.demo.show import MethodResult, table
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.model.clip import load_clip
from pipeline.model.towers import adapter_targets
from pipeline.tuning.grid import load_grid
from pipeline.tuning.trials import expand


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("demo"))


def test_the_assets_stay_below_40_megabytes() -> None:
    files = [path for path in asset(".").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6


def test_the_training_shards_are_whole(data: Path) -> None:
    for name, samples in (("clothing_train", 3068), ("pretrain", 12830), ("reference", 2048)):
        report = verify(data / name, decode=False)
        assert report.ok, report.faults
        assert load_index(data / name).samples == samples


def test_reference_images_are_pretraining_images(data: Path) -> None:
    """None of them is a photo of clothes to train on, and none is evaluated."""

    def digests(folder: Path) -> set[str]:
        found = set()
        for file in sorted(folder.rglob("*.tar")):
            with tarfile.open(file) as tar:
                for member in tar:
                    if member.name.endswith(".webp"):
                        found.add(hashlib.sha256(cast("BinaryIO", tar.extractfile(member)).read()).hexdigest())
        return found

    reference = digests(data / "reference")
    assert len(reference) > 2000
    assert reference <= digests(data / "pretrain")
    assert not reference & digests(data / "clothing_train")
    assert not reference & digests(data / "eval")


def test_the_benchmark_has_all_four_groups_and_counts(data: Path) -> None:
    benchmark = load_benchmark(data / BENCHMARK)
    assert [row.group for row in benchmark.rows] == ["id", "shift", *["zero-shot"] * 3, "retrieval"]
    counts = {row.key: len(open_eval_set(row.path)) for row in benchmark.rows}
    assert counts["clothing"] == 713
    assert counts["grocery"] == 2485
    assert open_eval_set(data / "eval" / "clothing").classnames == CLOTHING


def test_the_shipped_clip_has_144_targets(repository: Path) -> None:
    """The shipped clip has 144 targets and the committed architecture."""
    clip = load_clip(f"local-dir:{asset(MODEL)}")
    assert len(adapter_targets(clip.model)) == 144
    recipe = json.loads((repository / "pipeline/demo/architecture/open_clip_config.json").read_text())
    assert clip.model_cfg == recipe["model_cfg"]


def test_unpacking_twice_changes_nothing(data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.tar")}
    unpack(data)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.tar")} == before
    assert sorted(path.name for path in data.iterdir()) == sorted([*ARCHIVES.values(), BENCHMARK])


def test_an_archive_depends_on_content_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("a")
    archive(tmp_path / "set", tmp_path / "one.tar.gz")
    (tmp_path / "set" / "a.txt").write_text("a")
    archive(tmp_path / "set", tmp_path / "two.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()


def test_captions_say_both_names_once() -> None:
    found = captions(Picture(Path("x"), kind="apple", name="granny smith"), ("a photo of {c}.", "{c}"))
    assert found == ("a photo of granny smith.", "a photo of apple.", "granny smith", "apple", "granny smith, apple")
    assert captions(Picture(Path("x"), "hat", "hat"), ("{c}",)) == ("hat",)


def test_the_sweep_compares_methods_with_and_without_keep(tmp_path: Path) -> None:
    trials = expand(demo_config(tmp_path, seed=1), load_grid(asset(GRID)))
    assert len(trials) == 5
    assert {one.config.seed for one in trials} == {1}
    gated = [(one.config.adapter.rank, one.config.gate.lam) for one in trials if not one.baseline]
    assert gated == [(64, 0.3)]
    assert [one.label for one in trials if one.config.adapter.kind == "full"] == ["full (FLYP)"]
    kept = [one for one in trials if one.config.keep.weight]
    assert [one.config.gate.enabled for one in kept] == [False, True]
    assert all(one.config.keep.images == str(tmp_path / "data" / "reference") for one in kept)


def test_the_table_shows_every_trial_with_its_gain() -> None:
    rows = [
        MethodResult("untouched", 0.3, 0.7, 0.3, 0.1, 1.0, None, None),
        MethodResult("gated LoRA r16 *", 0.4, 0.6, 0.2, 0.05, 0.7, ("emoji", 0.5), (12, 144)),
    ]
    text = table(rows)
    assert all(row.label in text for row in rows)
    assert "12/144 (8%)" in text
    assert "+10.0" in text
    assert text.splitlines()[-1].split()[-3:] == ["70.0", "emoji", "50.0"]


def test_the_printed_command_is_the_sweep_of_the_demo(tmp_path: Path) -> None:
    _, *words = shlex.split(sweep_command(tmp_path / "my out", seed=3))
    arguments = build_parser().parse_args(words)
    assert load_config(arguments.config, arguments.overrides) == demo_config(tmp_path / "my out", seed=3)
    assert (arguments.command, arguments.grid, arguments.retry_failed) == ("sweep", str(asset(GRID)), True)
