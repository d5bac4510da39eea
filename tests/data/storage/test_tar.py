"""Reading one tar by its headers: the same as webdataset, and an error where that would silently read less."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from webdataset.compat import WebDataset

from pipeline.data.storage.tar import BLOCK, TarError, TarIndex


def write(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


MEMBERS = [(f"s{i:03d}.{ext}", f"{ext}{i}".encode() * (i * 40)) for i in range(10) for ext in ("cls", "jpg")]


def everything(index: TarIndex) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (sample.key, {ext: index.read(number, ext) for ext in sample.members})
        for number, sample in enumerate(index.samples)
    ]


LONG = "folder.with.dot/" + "x" * 120 + "/n\u00e4me.seg.JPG"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_that_webdataset_reads(tmp_path: Path, kind: int) -> None:
    path = write(tmp_path / "a.tar", [*MEMBERS, (LONG, b"long"), (LONG[:-8] + ".txt", b"text")], kind)
    theirs = []
    for sample in WebDataset(str(path), shardshuffle=False):
        theirs.append((sample["__key__"], {ext: data for ext, data in sample.items() if not ext.startswith("__")}))
    assert everything(TarIndex(path)) == theirs


def test_remarks_and_folders_are_no_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("__meta__/x.json", b"{}"), ("README", b"x"), ("a.jpg", b"1"), (".jpg", b"2")])
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert everything(TarIndex(path)) == [("a", {"jpg": b"1"})]


def test_a_tar_cut_anywhere_is_an_error_and_never_a_shorter_tar(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + BLOCK * -(-tar.getmembers()[-1].size // BLOCK)
    for cut in [*range(0, end, 777), *range(0, end + 1, BLOCK)]:
        path.write_bytes(data[:cut])
        with pytest.raises(TarError, match=r"a.tar: cut off"):
            TarIndex(path)


def test_a_damaged_header_in_the_middle_is_an_error_at_its_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    with tarfile.open(path) as tar:
        at = tar.getmembers()[11].offset
    data = bytearray(path.read_bytes())
    data[at + 3] ^= 0x55
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 11, "tarfile is expected to stop without a word"
    with pytest.raises(TarError, match=f"damaged header at byte {at}"):
        TarIndex(path)


def test_a_member_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.JPG", b"2")])
    with pytest.raises(TarError, match=r"a.tar: a.JPG occurs twice"):
        TarIndex(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off at byte 0 of 0"),
        (b"not a tar" * 100, "damaged header at byte 0"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1\n", "git-lfs pointer.*git lfs pull"),
        (gzip.compress(b"x" * 5000, mtime=0), "compressed by gzip.*gunzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "compressed, .*unpack it to a plain tar"),
        (b"PK\x03\x04" + bytes(600), "a zip archive"),
        (b"<!DOCTYPE html><html><title>404</title>", "a web page and not a tar.*download it again"),
        (b"\n <HTML>" + b" " * 600, "a web page"),
    ],
)
def test_what_is_not_a_tar_is_called_by_its_name(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(TarError, match=rf"a\.tar: .*{message}"):
        TarIndex(tmp_path / "a.tar")
    with pytest.raises(TarError, match=r"b.tar: cannot be opened"):
        TarIndex(tmp_path / "b.tar")


def test_a_file_that_shrinks_under_the_reader_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    index = TarIndex(path)
    os.truncate(path, 3000)
    with pytest.raises(TarError, match=r"s009.jpg ends after 0 of"):
        index.read(9, "jpg")


def test_an_index_works_after_a_fork_a_pickle_and_a_close(tmp_path: Path) -> None:
    index = TarIndex(write(tmp_path / "a.tar", MEMBERS))
    expected = everything(index)
    child = os.fork()
    if child == 0:
        os._exit(0 if everything(index) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert everything(pickle.loads(pickle.dumps(index))) == expected
    index.close()
    assert everything(index) == expected


def test_indices_nobody_holds_give_their_files_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        TarIndex(path).read(1, "jpg")
    assert len(os.listdir("/proc/self/fd")) == before


def test_concatenated_tars_are_an_error(tmp_path: Path) -> None:
    """Tars joined by cat are an error and not the first of them."""
    one, two = write(tmp_path / "1.tar", MEMBERS[:8]), write(tmp_path / "2.tar", MEMBERS[8:])
    (tmp_path / "a.tar").write_bytes(one.read_bytes() + two.read_bytes())
    at = one.stat().st_size
    with pytest.raises(TarError, match=f"a.tar: ends at byte .* continues at byte {at} of .*tar --concatenate"):
        TarIndex(tmp_path / "a.tar")


def test_a_tail_of_zeros_is_a_download_that_was_not_finished(tmp_path: Path) -> None:
    """A downloader that takes the room beforehand leaves a file of the right size."""
    path = write(tmp_path / "a.tar", [(f"s{i}.jpg", bytes([i + 1]) * 5000) for i in range(40)])
    data = path.read_bytes()
    path.write_bytes(data[: 28 * 5632] + bytes(len(data) - 28 * 5632))
    with pytest.raises(TarError, match=rf"zeros from byte {28 * 5632} to its end at {len(data)}.*copy it again"):
        TarIndex(path)
    path.write_bytes(data.rstrip(b"\0") + bytes(2 * BLOCK - len(data.rstrip(b"\0")) % BLOCK))
    assert len(TarIndex(path)) == 40, "one block of zeros ends a tar as well"


@pytest.mark.parametrize(
    ("kind", "message"),
    [(tarfile.LNKTYPE, "is a link to a.jpg"), (tarfile.SYMTYPE, "is a link"), (tarfile.GNUTYPE_SPARSE, "is a sparse")],
)
def test_members_without_bytes_of_their_own_are_an_error(tmp_path: Path, kind: bytes, message: str) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.cls", b"0")])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = kind, "a.jpg"
        tar.addfile(info)
    with pytest.raises(TarError, match=rf"a\.tar: b\.jpg {message}"):
        TarIndex(path)


@pytest.mark.parametrize("record", [b"0 a=b\n", b"-5 a=b\n", b"x", b"999 a=b\n", b"11 size=-9\n", b"12 size=9x9\n"])
def test_a_damaged_pax_header_is_an_error_and_no_endless_loop(tmp_path: Path, record: bytes) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"1")])
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(header + record.ljust(BLOCK, b"\0") + path.read_bytes())
    with pytest.raises(TarError, match=r"a\.tar: damaged (pax )?header at byte"):
        TarIndex(path)


def test_a_message_about_thousands_of_members_is_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [(f"img.{i:04d}.{ext}", b"1") for i in range(2000) for ext in ("jpg", "cls")])
    (sample,) = TarIndex(path).samples
    assert str(sample).startswith("0000.cls, 0000.jpg, 0001.cls") and "and 3994 more" in str(sample)
    assert "names are split at their first dot" in str(sample)
    assert len(str(sample)) < 250
