"""A store that is away costs its attempts once, and leftover errors of its library are not printed."""

from __future__ import annotations

import asyncio
import gc
import logging

import fsspec
import fsspec.asyn
import pytest

from pipeline.config import ConfigError
from pipeline.data.storage import remote


def test_a_store_that_stays_away_is_given_its_attempts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one file has been given up, the next costs one request; a store that is back gets all attempts again."""
    monkeypatch.setattr(remote, "_given_up", {})
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    asked = 0

    def away() -> bytes:
        nonlocal asked
        asked += 1
        raise ConnectionResetError("gone")

    for url, failed in (("https://h/a", 3), ("https://h/b", 4), ("https://h/a", 5), ("https://other/a", 3)):
        with pytest.raises(ConfigError, match=f"{url}: failed {failed} times"):
            remote._retried(url, 3, away)
    assert asked == 8
    assert remote._retried("https://h/a", 3, lambda: b"x") == b"x"
    with pytest.raises(ConfigError, match="failed 3 times"):
        remote._retried("https://h/a", 3, away)


def test_a_store_that_failed_long_ago_has_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_given_up", {"https://h": (9, remote.time.monotonic() - remote._AWAY_S)})
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    answers = iter([OSError("once"), OSError("twice"), b"x"])

    def third() -> bytes:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert remote._retried("https://h/a", 3, third) == b"x"


def test_a_broken_connection_leaves_no_loop_messages(caplog: pytest.LogCaptureFixture) -> None:
    """What a broken connection leaves in the loop is not printed."""
    fsspec.filesystem("memory").pipe("/loop", b"x")
    assert remote.read_bytes("memory://loop", 1) == b"x"

    async def fail() -> None:
        raise OSError("connection closed")

    async def forget() -> None:
        asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(0.01)
        gc.collect()

    with caplog.at_level(logging.DEBUG):
        asyncio.run_coroutine_threadsafe(forget(), fsspec.asyn.get_loop()).result(10)
    assert [record.name for record in caplog.records if "never retrieved" in record.getMessage()] == ["selora.data"]
