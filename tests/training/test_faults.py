"""Common faults of users and machines, and the resulting message or continuation."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.training.checkpoint import latest_checkpoint


def refused(run) -> str:
    """The message of a run that ends as a user's mistake should: exit code 2, no traceback."""
    codes = run.wait()
    assert set(codes) == {2}, run.text()
    assert "Traceback" not in run.text()
    return run.text()


def test_a_target_that_matches_nothing_is_named_with_near_ones(launch) -> None:
    text = refused(launch("adapter.targets=['image.0.q_prj']", world=1))
    assert "adapter.targets: 'image.0.q_prj' matches none of the 24 targets" in text
    assert "image.0.q_proj" in text


def test_other_base_weights_are_refused_on_resume(launch, tiny_clip: Path, tmp_path: Path, config_file: Path) -> None:
    own = tmp_path / "own_clip"
    shutil.copytree(tiny_clip, own)
    model = f"model.name=local-dir:{own}"
    assert launch(model, "train.steps=4", world=1).wait() == [0]
    weights = load_file(own / "open_clip_model.safetensors")
    weights["visual.conv1.weight"] = weights["visual.conv1.weight"] + 1
    save_file(weights, own / "open_clip_model.safetensors")
    # The schedule was finished; a checkpoint of a cut run is what a resume meets.
    state = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"step": 3}))
    text = refused(launch(model, "train.steps=4", world=1))
    assert "was trained on base weights" in text
    assert content["base_digest"][:12] in text


def test_a_missing_adapter_tensor_in_a_checkpoint_is_named(launch, tmp_path: Path) -> None:
    assert launch("train.steps=4", world=1).wait() == [0]
    folder = tmp_path / "runs" / "run" / "checkpoints" / "step-00000004"
    tensors = load_file(folder / "trainable.safetensors")
    lost = next(name for name in tensors if name.endswith("lora_B"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, folder / "trainable.safetensors")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"step": 2}))
    assert f"missing {lost}" in refused(launch("train.steps=4", world=1))


def test_changed_settings_of_a_run_are_refused(launch) -> None:
    """Changed settings under an old name are refused with the difference."""
    assert launch("train.steps=2", world=1).wait() == [0]
    text = refused(launch("train.steps=2", "adapter.rank=8", world=1))
    assert "adapter.rank: 4 -> 8" in text


def test_settings_corrected_early_are_a_new_attempt(launch, tmp_path: Path) -> None:
    """Settings corrected before the first checkpoint are a new attempt."""
    refused(launch("adapter.targets=['nowhere.*']", world=1))
    again = launch("train.steps=2", world=1)
    assert again.wait() == [0], again.text()
    assert (tmp_path / "runs" / "run.abandoned-1" / "config.yaml").exists()
    assert sorted(again.losses()) == [1, 2]


def test_other_shards_under_the_same_path_are_refused_on_resume(
    launch, shards: Path, tmp_path: Path, image_folder: Callable[..., Path]
) -> None:
    from pipeline.data.shards.index import pack

    own = tmp_path / "own"
    shutil.copytree(shards, own)
    stopped = launch(f"data.train={own}", "train.checkpoint_every=1000", world=1)
    stopped.signal_at(2, signal.SIGTERM, rank=0)
    assert stopped.wait() == [0], stopped.text()
    pack(image_folder(classes=4, each=24, size=40, seed=7), own, samples_per_shard=16, force=True)
    assert "was trained on shards" in refused(launch(f"data.train={own}", "train.checkpoint_every=1000", world=1))


def test_a_missing_shard_and_a_short_one_are_named(launch, shards: Path, tmp_path: Path) -> None:
    for fault in ("missing", "short"):
        copy = tmp_path / fault
        shutil.copytree(shards, copy)
        shard = sorted(copy.glob("*.tar"))[2]
        if fault == "missing":
            shard.unlink()
        else:
            os.truncate(shard, shard.stat().st_size // 2)
        text = refused(launch(f"data.train={copy}", world=1))
        assert shard.name in text
        assert (f"{shard.name}: missing" if fault == "missing" else "shorter than its index") in text


@pytest.fixture
def three_percent_corrupt(tmp_path: Path, image_folder: Callable[..., Path]) -> Path:
    """100 images, of which 3 are cut off in the middle; packed without the check that would leave them out."""
    from pipeline.data.shards.index import pack

    source = tmp_path / "photos"
    shutil.copytree(image_folder(classes=4, each=25, size=64, seed=9), source)
    for path in sorted(source.rglob("*.jpg"))[5:80:30]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        with pytest.raises(OSError, match="(?i)truncated"), Image.open(path) as image:
            image.load()
    pack(source, tmp_path / "packed", samples_per_shard=20, check="none")
    return tmp_path / "packed"


def test_corrupt_images_above_the_share_stop_the_run(launch, three_percent_corrupt: Path) -> None:
    """Corrupt images stop the run above the share and are named."""
    run = launch(f"data.train={three_percent_corrupt}", world=2)
    codes = run.wait()
    assert 2 in codes
    assert 0 not in codes
    assert "bad samples, more than data.max_bad_share allows" in run.text()
    assert ".tar/class_" in run.text()


def test_corrupt_images_below_the_share_are_replaced_and_counted(launch, three_percent_corrupt: Path) -> None:
    templates = "data.templates=['a photo of the hard to see {c}', '{c}']"
    run = launch(f"data.train={three_percent_corrupt}", "data.max_bad_share=0.05", templates, world=2)
    assert run.wait() == [0, 0], run.text()
    counts = [
        json.loads(line)["values"]
        for line in (run.directory / "journal.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "metrics"
    ]
    assert counts[-1]["data/bad_samples"] == 3
    # The tiny model reads eight tokens, and one of the two sentences has more.
    assert 0 < counts[0]["data/cut_captions"] < counts[-1]["data/cut_captions"] <= counts[-1]["train/samples_seen"]
    assert run.text().count("captions with more tokens than the model reads, whose ends are cut off: ") == 1
    assert len(set(re.findall(r"bad sample, another one is taken: (\S+\.tar/class_\S+): ", run.text()))) == 3


def test_a_loss_that_is_not_finite_stops_with_step_and_shards(launch) -> None:
    run = launch("adapter.kind=full", "train.lr=1e30", "train.warmup_steps=0", "gate.lr=null", world=1)
    text = refused(run)
    assert "the loss is not finite" in text
    assert "step 1:" in text or "step 2:" in text
    assert "shard-0000" in text
    assert latest_checkpoint(run.directory) is None


def test_a_dead_tracking_server_does_not_touch_the_training(launch) -> None:
    quiet = launch("name=quiet", world=1)
    assert quiet.wait() == [0], quiet.text()
    start = time.monotonic()
    run = launch("name=dead", "tracking.enabled=true", "tracking.uri=http://127.0.0.1:9", world=1)
    assert run.wait() == [0], run.text()
    assert time.monotonic() - start < 120
    assert run.losses() == quiet.losses()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),  # fast: test_resume.py
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_with_success(launch, number: signal.Signals) -> None:
    run = launch("train.checkpoint_every=1000000", "train.steps=100000", world=1)
    run.signal_at(3, number, rank=0)
    assert run.wait() == [0], run.text()
    checkpoint = latest_checkpoint(run.directory)
    assert checkpoint is not None
    assert 3 <= checkpoint.step < 100000
    assert f"stopped by a signal at step {checkpoint.step} of 100000" in run.text()


@pytest.fixture
def small_disk(make_disk: Callable[[str], Path]) -> Path:
    """A file system of 5 MB: one checkpoint of 3.5 MB fits, two do not."""
    return make_disk("5m")


def test_a_full_disk_leaves_the_last_checkpoint_whole(launch, small_disk: Path) -> None:
    """A full disk leaves the last checkpoint whole and the run says so."""
    common = (f"out={small_disk}", "adapter.rank=64", "train.train_rest=none", "train.keep_last=2")
    run = launch(*common, world=1)
    text = refused(run)
    assert "no space for the checkpoint of step" in text
    kept = latest_checkpoint(run.directory)
    assert kept is not None
    step = kept.step
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept.path / "trainable.safetensors").values())
    assert not list((run.directory / "checkpoints").glob(".*partial"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resumed = launch(*common, world=1)
    assert resumed.wait() == [0], resumed.text()
    assert f"continuing at step {step} of 12" in resumed.text()
