"""Reading one tar by its headers: what webdataset reads, and an error where it would go on with less."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

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
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
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
    with pytest.raises(TarError, match=r"a.tar: a.JPG comes twice"):
        TarIndex(path)


@pytest.mark.parametrize("data", [b"", b"not a tar" * 100, b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(TarError, match=r"a.tar"):
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
