"""Hostile files: nothing is read or written outside the named folders, and memory is bounded."""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import time
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from pipeline.cli import main
from pipeline.config import ConfigError, load_config
from pipeline.data.images import BadImageError, decode
from pipeline.data.shards.foreign import index_tars
from pipeline.data.shards.index import open_shard, pack, write_index
from pipeline.data.storage.tar import TarIndex
from pipeline.training.checkpoint import Checkpoint
from pipeline.tuning.grid import load_grid
from pipeline.tuning.trials import expand


def png(colour: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(out, "PNG")
    return out.getvalue()


def tar_of(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_names_that_lead_out_of_a_tar_stay_in_it(tmp_path: Path) -> None:
    names = ("/etc/x", "../../up", "a/../../b", "//double", "./c", "C:\\\\d", "a\nb", "-rf", "~root/e")
    members = [part for name in names for part in ((f"{name}.png", png()), (f"{name}.txt", b"a sight"))]
    tar_of(tmp_path / "in/0.tar", *members)
    before = files_below(tmp_path)
    assert index_tars(tmp_path / "in").account.packed == len(names)
    assert files_below(tmp_path) == before | {"in/index.json"}
    index = pack(tmp_path / "in/0.tar", tmp_path / "out").index
    assert files_below(tmp_path) == before | {"in/index.json", "out", "out/index.json", "out/shard-00000.tar"}
    with tarfile.open(index.directory / "shard-00000.tar") as made:
        assert not [name for name in made.getnames() if name.startswith("/") or ".." in name or "\n" in name]
    assert len(open_shard(index, 0)) == len(names)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_not_followed(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not for everybody")
    tar_of(tmp_path / "in/0.tar", ("a.png", png()), special("a.txt", kind, str(secret)))
    with pytest.raises(ConfigError, match=r"0.tar: a.txt is a link to .*; make the tar with --dereference"):
        index_tars(tmp_path / "in")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_devices_and_pipes_in_a_tar_are_not_opened(tmp_path: Path, kind: bytes) -> None:
    tar_of(tmp_path / "in/0.tar", ("a.png", png()), ("a.txt", b"a sight"), special("b.png", kind))
    index_tars(tmp_path / "in")
    assert [sample.key for sample in TarIndex(tmp_path / "in/0.tar").samples] == ["a"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_name_of_many_megabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 64 * 2**20
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(info.size + 4096)
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"0.tar: damaged header at byte 0: a name of 67108864 bytes"):
        TarIndex(tmp_path / "0.tar")
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("length", [2**31, 2**63, 100_000_001])
def test_a_header_of_two_gigabytes_is_refused(tmp_path: Path, length: int, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors begins with the length of its header, which its reader must not believe."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", length) + b'{"a"')
        out.truncate(2**31 + 64)  # sparse
    (tmp_path / "optimizer.safetensors").symlink_to(file)
    from safetensors import SafetensorError

    with pytest.raises(SafetensorError):
        Checkpoint(tmp_path, {"step": 1}).moments()
    (tmp_path / "open_clip_config.json").write_text(
        '{"model_cfg": {"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32},'
        ' "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}},'
        ' "preprocess_cfg": {}}'
    )
    file.rename(tmp_path / "open_clip_model.safetensors")
    from pipeline.model.clip import load_clip

    with pytest.raises(ConfigError, match="local-dir") as caught:
        load_clip(f"local-dir:{tmp_path}")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_few_lines_of_yaml_do_not_stand_for_billions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "data: {train: x, templates: *a11}"]))
    start = time.monotonic()
    assert main(["config", str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml: its aliases (*name) expand to more than 100000 values" in capsys.readouterr().err
    assert time.monotonic() - start < 30
    lines = ["a0: &a0 {k: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "data: *a11"]))
    with pytest.raises(ConfigError, match="expand to more than"):
        load_config(tmp_path / "c.yaml")


def test_yaml_makes_no_objects_and_no_endless_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, message in (
        ("seed: !!python/object/apply:os.system ['touch made']", "could not determine a constructor"),
        (f"seed: {'9' * 5000}", "a number of 5000 digits"),
        ("seed: &s [*s]", "an alias"),
    ):
        path.write_text(f"data: {{train: x}}\n{text}\n")
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    assert not os.path.exists("made")


def test_a_grid_of_billions_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {train: x}\n")
    values = ", ".join(map(str, range(1, 101)))
    (tmp_path / "g.yaml").write_text(
        f"grid: {{rank: [{values}], seed: [{values}], train.steps: [{values}], train.log_every: [{values}]}}\n"
    )
    with pytest.raises(ConfigError, match="grid: 100000000 trials, at most 10000"):
        expand(load_config(tmp_path / "c.yaml"), load_grid(tmp_path / "g.yaml"))


def bomb(kind: str) -> bytes:
    """A few kilobytes that stand for gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    if kind == "pixels":
        head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    out = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    if kind == "text":
        info.add_text("Comment", "x" * 2**28, zip=True)
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    if kind == "profile":
        profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**28)))
        return out.getvalue()[:33] + profile + out.getvalue()[33:]
    return out.getvalue()


@pytest.mark.parametrize("kind", ["pixels", "text", "profile"])
@pytest.mark.parametrize("form", ["fast", "reference"])
def test_an_image_of_a_few_kilobytes_takes_no_gigabyte(kind: str, form: str) -> None:
    data = bomb(kind)
    assert len(data) < 2**20
    tracemalloc.start()
    with suppress(BadImageError):
        decode(data, form=form)  # pyright: ignore[reportArgumentType]
    assert tracemalloc.get_traced_memory()[1] < 80 * 2**20
    tracemalloc.stop()


def test_random_bytes_never_make_a_tar_reader_run_away(tmp_path: Path) -> None:
    draw = random.Random(5)
    for number in range(200):
        data = bytearray(tar_of(tmp_path / "x.tar", ("a.png", png()), ("a.txt", b"x")).read_bytes())
        for _ in range(6):
            data[draw.randrange(1024)] = draw.randrange(256)
        (tmp_path / "y.tar").write_bytes(data)
        start = time.monotonic()
        try:
            found = len(TarIndex(tmp_path / "y.tar"))
        except ConfigError:
            continue
        assert found <= 2, number
        assert time.monotonic() - start < 10


def test_an_index_that_names_files_elsewhere_reads_none(tmp_path: Path) -> None:
    """index.json comes with the shards, so whoever made them chose the names in it."""
    pack_from = tmp_path / "in/0.tar"
    tar_of(pack_from, ("a.png", png()), ("a.txt", b"x"))
    (shard,) = index_tars(pack_from).index.shards
    for name in ("../in/0.tar", str(pack_from)):
        with pytest.raises(
            ConfigError, match=r"index.json: names the shard '.*0.tar', and shards are files next to it"
        ):
            write_index(tmp_path / "out", [replace(shard, name=name)], None, {})
