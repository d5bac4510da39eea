"""Damaged tars, folders and evaluation sets at random: an answer or a message, never a traceback or a wrong sum."""

from __future__ import annotations

import io
import os
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.eval.wds_layout import open_eval_set
from pipeline.data.shards.foreign import index_tars
from pipeline.data.sources.formats import read_source
from pipeline.data.storage.tar import TarIndex

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("SELORA_FUZZ_SECONDS", "60"))


def jpeg(colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def tar_of(draw: random.Random) -> bytes:
    out = io.BytesIO()
    kind = draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for number in range(draw.randrange(1, 6)):
            key = draw.choice((f"{number:05d}", f"a.b{number}", "ä" * 120 + str(number), f"x/{number}", "same"))
            for ext, data in (("jpg", jpeg(number)), ("cls", b"1"), ("txt", b"a sight"), ("json", b'{"caption": 3}')):
                if draw.random() < 0.7:
                    info = tarfile.TarInfo(f"{key}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def damaged(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(changed))
        changed[at : at + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(9))
    how = draw.randrange(5)
    if how == 0:
        return bytes(changed[: draw.randrange(len(changed))])
    if how == 1:
        return bytes(changed) + data
    return bytes(changed)


def rounds(work: Callable[[random.Random], None]) -> None:
    """As many rounds as there is time for; the seed of one that fails is in the message."""
    end, seed = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        seed += 1
        try:
            work(random.Random(seed))
        except ConfigError as error:
            if not 0 < len(str(error)) < 6000:
                pytest.fail(f"seed {seed}: a message of {len(str(error))} letters")
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


def test_damaged_tars_are_read_whole_or_refused(tmp_path: Path) -> None:
    def work(draw: random.Random) -> None:
        path = tmp_path / "0.tar"
        path.write_bytes(damaged(tar_of(draw), draw))
        tar = TarIndex(path)
        for number, sample in enumerate(tar.samples):
            for ext in sample.members:
                tar.read(number, ext)
        made = index_tars(path, force=True, max_unreadable=1)
        assert made.account.seen == made.index.samples

    rounds(work)


def test_damaged_evaluation_sets_are_opened_or_refused(tmp_path: Path) -> None:
    def work(draw: random.Random) -> None:
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test/0.tar").write_bytes(damaged(tar_of(draw), draw) if draw.random() < 0.5 else tar_of(draw))
        texts = {
            "test/nshards.txt": ["1", "2", "", "\ufeff1\n", "one", "-1", "1\n1", "²"],
            "classnames.txt": ["a\nb\n", "", "a\n\nb\n", "\ufeffa\r\nb\r\n", "\xff", "a"],
            "zeroshot_classification_templates.txt": ["a photo of {c}.", "{}", "%s", "", "{c} {x}"],
            "dataset_type.txt": ["classification", "retrieval", "x", ""],
        }
        for name, choices in texts.items():
            code = draw.choice(("utf-8", "utf-8", "utf-16", "latin-1"))
            (tmp_path / name).write_bytes(draw.choice(choices).encode(code, "replace"))
        assert len(open_eval_set(tmp_path)) > 0

    rounds(work)


def test_folders_of_any_files_add_up(tmp_path: Path) -> None:
    names = [b"a.jpg", b"b.JPEG", b"c\xe9.png", b".d.jpg", b"Thumbs.db", b"e.txt", b"a.txt", b"a.json", b"f", b"g.heic"]
    folders = [b"", b"cat", b"dog", b"@eaDir", b".git", b"cat/deep", b"d\xe9", b"\xc3\xa9", b"e\xcc\x81"]

    def work(draw: random.Random) -> None:
        root = os.fsencode(tmp_path) + b"/%d" % draw.randrange(2**60)
        os.mkdir(root)
        made = 0
        for folder in draw.sample(folders, draw.randrange(1, 6)):
            os.makedirs(root + b"/" + folder, exist_ok=True)
            for name in draw.sample(names, draw.randrange(1, 6)):
                data = draw.choice((jpeg(3), b"", b"text", b'{"caption": "x"}', b"\xff"))
                Path(os.fsdecode(root + b"/" + folder + b"/" + name)).write_bytes(data)
                made += 1
            if draw.random() < 0.3:
                os.symlink(draw.choice((b"..", b".", b"/nowhere", root)), root + b"/" + folder + b"/link")
                made += 1
        account = read_source(os.fsdecode(root)).account()
        assert account.seen == made, f"{account}"

    rounds(work)
