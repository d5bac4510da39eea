"""Training shards in a real S3 store that fails in a twentieth of all requests."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faulty_s3
import pytest

from pipeline.config import ConfigError
from pipeline.data.shards.index import ShardIndex, load_index
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.remote import MissingError, local_copy
from pipeline.data.train.stream import TrainDataset, train_loader

ROOT = Path(__file__).parents[3]
SAMPLES, PER_SHARD, BATCH, RANKS = 800, 4, 16, 2


@pytest.fixture
def index(shards_of: Callable[..., ShardIndex], photo: Callable, encode: Callable[..., bytes]) -> ShardIndex:
    images = [encode(photo(seed), "JPEG") for seed in range(16)]
    members = [{"jpg": images[number % 16], "cls": b"0"} for number in range(SAMPLES)]
    return shards_of(members, per_shard=PER_SHARD)


def test_an_epoch_from_a_faulty_store_is_complete(
    store: faulty_s3.FaultyStore, index: ShardIndex, tmp_path: Path
) -> None:
    """An epoch from a store with errors has each sample once and counts the retries."""
    shutil.copytree(index.directory, store.root / "bucket" / "train")
    far = load_index("s3://bucket/train", Cache(tmp_path / "cache", 10**9))
    assert far.digest == index.digest
    store.done.clear()
    store.served.clear()
    keys, retries = [], 0
    for rank in range(RANKS):
        dataset = TrainDataset(far, size=16, seed=0, streams=4, window=8)
        loader = train_loader(
            dataset, global_batch=BATCH, start_step=0, stop_step=SAMPLES // BATCH, rank=rank, world=RANKS, workers=2
        )
        for batch in loader:
            assert not batch.bad
            keys += batch.keys
            retries += batch.retries
    assert len(keys) == len(set(keys)) == SAMPLES
    assert retries == store.faults() >= 5
    assert store.done.keys() == {*faulty_s3.FAULTS, "slow", ""}
    # Both ranks and all workers share the node's cache: nothing was fetched twice.
    assert sum(store.served.values()) == SAMPLES // PER_SHARD


def test_an_absent_store_and_a_wrong_key_are_named(
    store: faulty_s3.FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that stays away is reported with its url and a wrong key at once."""
    (store.root / "bucket").mkdir()
    (store.root / "bucket" / "file").write_bytes(b"12345")
    cache = Cache(tmp_path / "cache", 10**9, attempts=4)
    store.errors = 0.0
    with pytest.raises(MissingError, match="s3://bucket/other: no such file"):
        local_copy("s3://bucket/other", cache)
    store.errors = 1.0
    with caplog.at_level(logging.WARNING, "selora"), pytest.raises(ConfigError, match="s3://bucket/file: failed 4 ti"):
        local_copy("s3://bucket/file", cache, size=5, sha256="0" * 64)
    assert store.faults() == 4
    assert [record.getMessage()[:42] for record in caplog.records] == ["s3://bucket/file: failed 3 times in a row,"]
    store.errors = 0.0
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match="s3://bucket/file: access refused .*credentials are taken from AWS_"):
        local_copy("s3://bucket/file", cache)


@pytest.mark.slow
def test_training_from_a_faulty_store_equals_the_disk(store: faulty_s3.FaultyStore, tmp_path: Path) -> None:
    """A training from a store with errors ends like one from the disk."""
    from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack

    unpack(tmp_path, "clothing_train.tar.gz")
    shutil.copytree(tmp_path / "clothing_train", store.root / "bucket" / "train")

    def losses(name: str, place: str) -> dict[int, dict[str, float]]:
        settings = [
            f"model.name=local-dir:{asset(MODEL)}",
            f"data.train={place}",
            f"out={tmp_path}/runs",
            f"name={name}",
        ]
        settings += ["train.steps=8", "train.global_batch_size=32", "train.log_every=1"]
        command = [sys.executable, "-m", "pipeline", "train", str(asset(FINETUNE)), *settings, "tracking.enabled=false"]
        environment = os.environ | {"SELORA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True, timeout=300)
        records = [json.loads(line) for line in (tmp_path / "runs" / name / "journal.jsonl").read_text().splitlines()]
        return {record["step"]: record["values"] for record in records if record["kind"] == "metrics"}

    store.errors = 0.4
    far, near = losses("far", "s3://bucket/train"), losses("near", str(tmp_path / "clothing_train"))
    assert [far[step]["train/loss"] for step in far] == [near[step]["train/loss"] for step in near]
    assert 0 < far[8]["data/retries"] <= store.faults()
    assert near[8]["data/retries"] == 0
