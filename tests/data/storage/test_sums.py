"""Checksums of tars, computed once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from pipeline.data.storage import sums
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.sums import content_sums
from pipeline.data.storage.tar import TarIndex


@pytest.fixture
def tars(tmp_path: Path) -> list[TarIndex]:
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(bytes(10240))
    return [TarIndex(tmp_path / f"{name}.tar") for name in "ab"]


def expected(tars: list[TarIndex]) -> list[str]:
    return [hashlib.sha256(tar.path.read_bytes()).hexdigest() for tar in tars]


def test_a_file_is_read_once_and_a_changed_one_again(
    tars: list[TarIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", 10**9)
    assert content_sums("here", tars, cache) == expected(tars)
    kept = tmp_path / "cache/sums" / f"{hashlib.sha256(b'here').hexdigest()[:24]}.json"
    assert not kept.exists(), "they were written a moment ago, and could change without a new date"
    monkeypatch.setattr(sums, "UNCHANGED_NS", -(10**12))
    assert content_sums("here", tars, cache) == expected(tars)
    known = json.loads(kept.read_text())
    kept.write_text(json.dumps({name: [*entry[:-1], "kept"] for name, entry in known.items()}))
    assert content_sums("here", tars, cache) == ["kept", "kept"]
    time.sleep(0.02)
    tars[1].path.write_bytes(bytes(10239) + b"x")
    os.utime(tars[1].path, ns=(known[str(tars[1].path)][2],) * 2)
    assert content_sums("here", tars, cache) == ["kept", expected(tars)[1]]


@pytest.mark.parametrize("spoil", ["{", "[]", '{"a": 3}'])
def test_a_cache_that_is_damaged_or_not_writable_changes_nothing(
    tars: list[TarIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    cache = Cache(tmp_path / "cache", 10**9)
    monkeypatch.setattr(sums, "UNCHANGED_NS", -(10**12))
    content_sums("here", tars, cache)
    (kept,) = (tmp_path / "cache/sums").glob("*.json")
    kept.write_text(spoil)
    assert content_sums("here", tars, cache) == expected(tars)
    (tmp_path / "file").touch()
    assert content_sums("here", tars, Cache(tmp_path / "file", 10**9)) == expected(tars)
