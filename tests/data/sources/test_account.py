"""The account of a source adds up, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.sources.account import Account, LeftOut
from pipeline.data.sources.sample import Sample, Source


def test_an_account_that_does_not_add_up_is_refused() -> None:
    left_out = (LeftOut("a.jpg", "no caption"), LeftOut("b.jpg", "no such file"), LeftOut("c.jpg", "no caption"))
    account = Account(10, 4, left_out, {".txt files": 3})
    assert account.reasons == {"no caption": 2, "no such file": 1}
    assert account.as_json()["names"][1] == {"name": "b.jpg", "reason": "no such file", "detail": ""}
    with pytest.raises(ValueError, match="11 seen, but 10 accounted for"):
        Account(11, 4, left_out, {".txt files": 3})


def test_samples_found_unusable_move_from_packed_to_left_out(tmp_path: Path) -> None:
    samples = [Sample(key, key, tmp_path) for key in "abc"]
    source = Source("x", tmp_path, samples, left_out=[LeftOut("d", "no such file")], ignored={"hidden": 2}, seen=6)
    account = source.account([LeftOut("b", "unreadable image", "image file is truncated")])
    assert (account.seen, account.packed) == (6, 2)
    assert [str(each) for each in account.left_out] == ["d: no such file", "b: image file is truncated"]
