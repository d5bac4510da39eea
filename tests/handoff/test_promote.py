"""From a run with results to a version in a real registry, and back out of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import main
from pipeline.config import ConfigError, Promote
from pipeline.handoff.predict import predict_files
from pipeline.handoff.promote import promote, results_of, rollback
from pipeline.handoff.source import read_source
from pipeline.model.restore import load_run
from pipeline.runs.results import reported_at, write_floors
from pipeline.tracking.mlflow.registry import Registry
from pipeline.tracking.tracker import open_tracker


@pytest.fixture(scope="module")
def runs(
    make_run: Callable[..., Path],
    evaluated: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
    write_sweep_of: Callable[..., None],
) -> tuple[Path, Path]:
    """Two runs with results, in one directory, which is a sweep as well."""
    sweep = tmp_path_factory.mktemp("search") / "sweep"
    first, second = (
        evaluated(make_run("lora", True, directory=sweep / "trials" / name, seed=seed))
        for seed, name in ((1, "first"), (2, "second"))
    )
    write_sweep_of(sweep, "first", "second", "third")
    return first, second


def test_a_run_becomes_champion_and_is_rolled_back(
    runs: tuple[Path, Path], store: str, photo: bytes, tmp_path: Path, pixels_of: Callable[..., Any]
) -> None:
    """A run becomes challenger then champion then is rolled back."""
    first, second = runs
    with open_tracker(first, run_name="first", uri=store, experiment="selora") as tracker:
        tracker.tags({"git.commit": "0123abc"})  # as training does
    done = promote(first, "clothes", Promote(min_id=0.0), uri=store)
    assert (done.version, done.new, done.aliases) == ("1", True, ("challenger",))
    tags = Registry(store, "clothes").tags("1")
    source = read_source(first)
    assert tags["selora.weights_digest"] == source.weights_digest
    assert tags["selora.base_digest"] == source.clip.digest
    assert len(tags["selora.adapter_digest"]) == len(tags["selora.benchmark_digest"]) == 64
    assert tags["selora.active_blocks"] == "48/144"
    assert tags["selora.gate_map"].startswith("image.0: q out; image.1: q out")
    assert tags["selora.result"].startswith("id 0.")
    kept = json.loads((first / "eval" / "summary.json").read_text())["kept"]
    assert kept["worst"] == "others" and kept["mean"] == min(1, kept["worst_share"])
    assert tags["selora.kept"] == repr(kept["mean"])
    assert tags["selora.kept_worst"] == f"others {kept['worst_share']:.4f}"
    assert tags["selora.git_commit"] == "0123abc"
    assert tags["selora.run"] == json.loads((first / "run.json").read_text())["tracking"]["run"]

    again = promote(first, "clothes", Promote(), champion=True, uri=store)
    assert (again.version, again.new, again.aliases) == ("1", False, ("champion",))
    other = promote(second, "clothes", Promote(), champion=True, uri=store)
    assert (other.version, other.aliases, other.previous_champion) == ("2", ("champion",), "1")
    assert "never tracked" in str(other)

    file = tmp_path / "photo.png"
    file.write_bytes(photo)
    uris = ("models:/clothes@champion", "models:/clothes/2")
    by_alias, by_version = (predict_files(each, [file], uri=store, top_k=10) for each in uris)
    assert by_alias == by_version
    clip: Any = load_run(second)
    with torch.no_grad():
        image = torch.nn.functional.normalize(clip.model.encode_image(pixels_of(photo, clip)), dim=-1)
    heads = {}
    for name in by_alias[0]["labels"]:
        captions = [each.replace("{c}", name) for each in _templates(second)]
        with torch.no_grad():
            texts = torch.nn.functional.normalize(clip.model.encode_text(clip.tokenizer(captions)), dim=-1)
        heads[name] = float(image @ torch.nn.functional.normalize(texts.mean(0), dim=-1))
    assert max(heads, key=heads.__getitem__) == by_alias[0]["label"]
    assert sum(by_alias[0]["scores"]) == pytest.approx(1, abs=1e-5)

    assert rollback("clothes", store) == ("2", "1")
    with pytest.raises(ConfigError, match="version 1 is the first champion"):
        rollback("clothes", store)


def _templates(run: Path) -> list[str]:
    from pipeline.config import load_config
    from pipeline.prompts import resolve_templates

    return list(resolve_templates(load_config(run / "config.yaml").data.templates))


def test_a_rule_that_fails_registers_nothing(
    runs: tuple[Path, Path], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["promote", str(runs[0]), "--name", "never", "--uri", store]
    assert main([*arguments, "--rule", "min_id=1.0", "promote.min_dataset=[others >= 0.0]"]) == 1
    message = capsys.readouterr().out
    assert "FAILS  promote.min_id: mean of id 0." in message
    assert "holds  promote.min_dataset: others" in message
    assert "is not promoted" in message
    assert Registry(store, "never").version_of(read_source(runs[0]).weights_digest) is None
    assert main([*arguments, "--rule", "min_idd=1.0"]) == 2
    assert "did you mean promote.min_id" in capsys.readouterr().err


def test_results_of_other_weights_or_of_a_part_are_refused(runs: tuple[Path, Path], store: str, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    shutil.copytree(runs[0], stale)
    shutil.rmtree(stale / "eval")
    with pytest.raises(ConfigError, match="has no results: run `selora evaluate"):
        promote(stale, "clothes", uri=store)
    shutil.copytree(runs[1] / "eval", stale / "eval")
    with pytest.raises(ConfigError, match="these results are of the weights .* again"):
        promote(stale, "clothes", uri=store)
    source = read_source(runs[0])
    summary = json.loads((runs[0] / "eval/summary.json").read_text())
    (stale / "eval/summary.json").write_text(json.dumps(summary | {"limit": 6}))
    with pytest.raises(ConfigError, match="6 images a dataset"):
        results_of(type(source)(stale, source.found, source.model, source.weights_digest))


def test_a_worse_trial_does_not_become_champion(runs: tuple[Path, Path], store: str) -> None:
    """Of a sweep the chosen trial is promoted and a worse one does not become champion."""
    from pipeline.runs.results import read_summary
    from pipeline.selection.candidates import Candidate, take
    from pipeline.selection.ranking import point_of

    sweep = runs[0].parent.parent
    points = {run.name: point_of(read_summary(run / "eval")) for run in runs}
    assert all(points.values())
    best = take([Candidate(name, name, point) for name, point in points.items() if point is not None]).name
    done = promote(sweep, "chosen", Promote(champion="if_better"), uri=store)
    assert done.run_dir == sweep / "trials" / best
    assert "chosen of 2 trials" in str(done)
    assert "1 without results" in str(done)
    assert done.aliases == ("champion",)
    worse = sweep / "trials" / ("second" if best == "first" else "first")
    summary = json.loads((worse / "eval/summary.json").read_text())
    before = json.loads((done.run_dir / "eval/summary.json").read_text())
    summary["groups"]["id"]["mean"] = before["groups"]["id"]["mean"] - 0.1
    (worse / "eval/summary.json").write_text(json.dumps(summary))
    later = promote(worse, "chosen", Promote(champion="if_better"), uri=store)
    assert later.aliases == ("challenger",)
    assert "version 1 stays champion, id is" in str(later)


def test_after_a_change_of_the_floor_the_sweep_decides(
    runs: tuple[Path, Path], store: str, tmp_path: Path, write_sweep_of: Callable[..., None]
) -> None:
    """The trial was evaluated at 0.97 when the sweep, interrupted since, changed to 0.95."""
    trial = tmp_path / "trials" / "second"
    shutil.copytree(runs[1], trial)
    write_sweep_of(tmp_path, "second", floor=0.95)
    shutil.copytree(trial / "eval", trial / reported_at(1.0))
    floors = {"0.97": {"alpha": 0.5, "id": 0.3, "kept": 0.98}, "0.95": {"alpha": 1.0, "id": 0.4, "kept": 0.96}}
    write_floors(trial / "eval", {"floor": 0.97, "choosing_digest": "c", "floors": floors})
    done = promote(tmp_path, "changed", Promote(), uri=store)
    assert "strength 1 keeps 95.00% on the images it was chosen on, and 96.00% on the others" in done.notes
    assert Registry(store, "changed").tags("1")["selora.floor"] == "kept >= 0.95"


def test_a_folder_that_is_neither_run_nor_sweep_is_refused(tmp_path: Path, store: str) -> None:
    with pytest.raises(ConfigError, match="neither a run .* nor a sweep"):
        promote(tmp_path, "clothes", uri=store)
    with pytest.raises(ConfigError, match="a model name has none of"):
        Registry(store, "a/b")
