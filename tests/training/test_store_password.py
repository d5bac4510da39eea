"""A store with a password, which is used but never written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_servers import serving_guarded

from pipeline.config import Config, ConfigError, digest, flatten, load_config, override, to_yaml
from pipeline.data.shards.index import load_index
from pipeline.data.storage.folders import STORE_PASSWORD
from pipeline.passwords import password_in
from pipeline.tuning.sweep import _hand_down_passwords

PASSWORD = "canary/p@ss word"
QUOTED = "canary%2Fp%40ss%20word"


@pytest.fixture
def guarded(shards: Path) -> Iterator[str]:
    """HOST:PORT of a server that gives the shards to `me` with the password."""
    with serving_guarded(shards, PASSWORD) as address:
        yield address


def test_a_run_from_a_guarded_store_keeps_no_password(guarded: str, launch, tmp_path: Path, monkeypatch) -> None:
    """The same command continues; a command that has only config.yaml takes the password from the environment."""
    monkeypatch.setenv("SELORA_CACHE", str(tmp_path / "cache"))
    url = f"http://me:{QUOTED}@{guarded}"
    run = launch(f"data.train={url}", "train.steps=4", "data.workers=1", world=1)
    assert run.wait() == [0], run.text()
    again = launch(f"data.train={url}", "train.steps=4", world=1)
    assert again.wait() == [0], again.text()
    for path in [
        path for folder in (run.directory, tmp_path / "cache") for path in folder.rglob("*") if path.is_file()
    ]:
        assert b"canary" not in path.read_bytes(), path
    assert "canary" not in run.text() + again.text()
    kept = load_config(run.directory / "config.yaml").data.train
    assert kept == f"http://me:***@{guarded}"
    with pytest.raises(ConfigError, match=rf"http://me:\*\*\*@{guarded}: its password .* by {STORE_PASSWORD}"):
        load_index(kept)
    monkeypatch.setenv(STORE_PASSWORD, PASSWORD)
    assert load_index(kept).samples == 96
    monkeypatch.setenv(STORE_PASSWORD, "wrong-canary")
    with pytest.raises(ConfigError, match="access refused") as caught:
        load_index(kept)
    assert "canary" not in str(caught.value)


def test_no_address_in_what_is_kept_of_a_config_has_its_password() -> None:
    keys = ("data.train", "eval.root", "eval.benchmark", "tracking.uri")
    plain = Config.model_validate({"data": {"train": "x"}})
    whole = override(plain, {key: f"https://me:canary@host/{key}" for key in keys})
    assert "canary" not in to_yaml(whole) + str(flatten(whole))
    assert to_yaml(whole).count("https://me:***@host/") == len(keys)
    assert digest(whole) == digest(override(whole, {"data.train": "https://me:other@host/data.train"}))


def test_a_message_never_has_a_password() -> None:
    assert str(ConfigError("s3://key:canary@bucket/x: no such file")) == "s3://key:***@bucket/x: no such file"


def test_the_trials_of_a_sweep_inherit_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_PASSWORD, "")
    monkeypatch.delenv(STORE_PASSWORD)
    config = Config.model_validate({"data": {"train": f"https://me:{QUOTED}@host/x"}})
    _hand_down_passwords(config)
    assert os.environ[STORE_PASSWORD] == PASSWORD == password_in(config.data.train)
    assert password_in(str(flatten(config)["data.train"])) is None
