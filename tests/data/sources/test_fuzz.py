"""Mutated tables, json and names: whatever comes in, it is read with a sum that adds up, or refused with a sentence.

SELORA_FUZZ_SECONDS sets how long each kind is tried (default 10); a failure prints the bytes that caused it.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import SourceOptions

SECONDS = float(os.environ.get("SELORA_FUZZ_SECONDS", "10"))
SEEDS = {
    "t.csv": b'path,caption,label\n0.jpg,"a ""big"" hat",hat\n./1.jpg,a cap; red,cap\nimages/2.jpg,,boot\n',
    "t.tsv": b'title\tfilepath\n"Untitled, oil\t0.jpg\na cap\t1.jpg\nthe cap\t1.jpg\n',
    "t.token.txt": b"0.jpg#0\ta hat\n1.jpg#0\ta cap\n",
    "t.json": b'{"images":[{"id":1,"file_name":"0.jpg"},{"id":"2","file_name":"1.jpg"}],'
    b'"annotations":[{"image_id":1,"caption":"a hat"},{"image_id":2,"caption":null}]}',
    "l.json": b'[{"image":"0.jpg","caption":["a","b"],"label":3.0},{"image":"1.jpg","caption":"c"}]',
    "t.jsonl": b'{"file_name":"0.jpg","text":"a hat"}\n{"file_name":"1.jpg","text":["x",{"raw":"y"}]}\n',
    "names.txt": b"hat\tsun hat\ncap\tbaseball cap\nboot\tankle boot\n",
}
PIECES = [
    *(bytes([value]) for value in range(256)),
    *(b'"', b'""', b"\t", b",", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"\xff\xfe", b"null", b"{}", b"[", b"]", b"\\ud800"),
    *(
        b"0.jpg",
        b"../",
        b"\\",
        b"C:\\",
        b"/",
        b"nan",
        b"1e999",
        b"sep=;\n",
        b"#0",
        b"\xe2\x80\xa8",
        b"9" * 5000,
        b"['a']",
    ),
]


def mutated(draw: random.Random, data: bytes) -> bytes:
    for _ in range(draw.randint(1, 8)):
        at, length = draw.randint(0, len(data)), draw.choice((0, 0, 1, 3, 20))
        other = draw.randint(0, len(data))
        piece = draw.choice((draw.choice(PIECES), data[other : other + draw.randint(0, 30)]))
        data = data[:at] + piece + data[at + length :]
    return data


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_nothing_but_a_sentence_refuses_a_source(tmp_path: Path, ten: list[str], name: str) -> None:
    draw, until, tried = random.Random(name), time.monotonic() + SECONDS, 0
    (tmp_path / "names.csv").write_text("path,label\n0.jpg,hat\n1.jpg,cap\n2.jpg,boot\n")
    while time.monotonic() < until or not tried:
        tried += 1
        data = mutated(draw, SEEDS[name])
        (tmp_path / name).write_bytes(data)
        options = SourceOptions(
            quotes=draw.choice(("auto", "csv", "none")), encoding=draw.choice((None, None, "cp1252", "utf-16-le"))
        )
        source = tmp_path / name
        if name == "names.txt":
            source, options = tmp_path / "names.csv", SourceOptions(classnames=source, encoding=options.encoding)
        try:
            found = read_source(source, options)
        except ConfigError:
            continue
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}, for {data!r} with {options}") from error
        assert found.account().packed == len(found.samples)
        assert len({sample.key for sample in found.samples}) == len(found.samples)
        # What is read can be written: captions and names are text of one line.
        for text in (*(found.classes or ()), *(text for sample in found.samples for text in sample.captions)):
            assert text.strip() and "\n" not in text, (text, data)
            text.encode()
