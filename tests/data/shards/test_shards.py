"""pack -> index -> verify: nothing lost, nothing changed without being noticed."""

from __future__ import annotations

import filecmp
import json
import os
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from pipeline.config import ConfigError
from pipeline.data.shards.index import ShardIndex, load_index, open_shard, pack, write_index, write_tar
from pipeline.data.shards.verify import verify
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import Sample, Source
from pipeline.data.storage.tar import BLOCK, TarIndex


@pytest.fixture
def copied(shards: ShardIndex, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(shards.directory, tmp_path / "copied"))


def stored(index: ShardIndex) -> dict[str, dict[str, bytes]]:
    found = {}
    for shard in index.shards:
        tar = TarIndex(index.directory / shard.name)
        found |= {s.key: {ext: tar.read(i, ext) for ext in s.members} for i, s in enumerate(tar.samples)}
    return found


def test_shards_hold_original_bytes_and_labels(shards: ShardIndex, class_folders: Path) -> None:
    """Shards hold the original bytes and labels of every image."""
    source = read_source(class_folders)
    assert stored(shards) == {
        sample.key: {"jpg": sample.image.read_bytes(), "cls": str(sample.cls).encode()} for sample in source.samples
    }
    assert shards.sizes() == [12, 12, 12, 12, 5]
    assert (shards.samples, shards.classes) == (53, ("ankle boot", "hat", "t-shirt"))
    assert verify(shards.directory).ok
    assert load_index(shards.directory) == shards


def test_webdataset_reads_the_shards(shards: ShardIndex) -> None:
    urls = [str(shards.directory / shard.name) for shard in shards.shards]
    decoded: Any = WebDataset(urls, shardshuffle=False).decode("pil")
    samples = list(decoded)
    assert len(samples) == 53
    assert {sample["cls"] for sample in samples} == {0, 1, 2}
    assert all(sample["jpg"].size == (48, 40) for sample in samples)


def test_packing_is_deterministic_for_a_seed(class_folders: Path, tmp_path: Path) -> None:
    """Packing again gives the same bytes and another seed another order."""
    first, second = (pack(class_folders, tmp_path / name, samples_per_shard=20).index for name in ("a", "b"))
    names = ["index.json", *(shard.name for shard in first.shards)]
    assert filecmp.cmpfiles(first.directory, second.directory, names, shallow=False) == (names, [], [])
    assert first.digest == second.digest
    third = pack(class_folders, tmp_path / "c", samples_per_shard=20, seed=1).index
    assert third.digest != first.digest
    assert stored(third) == stored(first)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads by offset from here on."""
    found: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: found.append(size) or pread(fd, size, at))
    return found


def test_a_shard_of_5000_samples_is_opened_by_one_read(
    tmp_path: Path, reads: list[int], photo: Callable[..., Image.Image]
) -> None:
    """The headers, 10,000 of them, say the same, and cost a read each."""
    photo(0).save(tmp_path / "a.jpg")
    samples = [Sample(f"{n:05d}", f"{n}", tmp_path / "a.jpg", None, (f"caption {n}",)) for n in range(5000)]
    shard = write_tar(tmp_path / "shard-00000.tar", samples, table=True)
    index = write_index(tmp_path, [shard], None, {})
    reads.clear()
    tar = open_shard(index, 0)
    assert len(reads) == 1
    scanned = TarIndex(tmp_path / "shard-00000.tar")
    assert len(reads) > 10_000
    assert tar.samples == scanned.samples
    assert tar.read(4321, "txt") == b"caption 4321"


def test_shards_without_a_table_are_opened_by_their_headers(shards: ShardIndex, copied: Path, reads: list[int]) -> None:
    """Of the version before: no table in the tar, none in the index."""
    content = json.loads((copied / "index.json").read_text())
    for shard in content["shards"]:
        del shard["table"]
    (copied / "index.json").write_text(json.dumps(content))
    index = load_index(copied)
    assert index.digest == shards.digest
    assert [open_shard(index, n).samples for n in range(5)] == [open_shard(shards, n).samples for n in range(5)]
    assert len(reads) > 5 * 12


@pytest.mark.parametrize("damage", ["torn", "beyond", "other"])
def test_a_table_that_is_wrong_is_named(copied: Path, damage: str) -> None:
    index = load_index(copied)
    shard = index.shards[1]
    assert shard.table is not None
    path = copied / shard.name
    with path.open("r+b") as file:
        file.seek(shard.table.offset)
        content = file.read(shard.table.size)
        last = str(TarIndex(path).samples[-1].members["jpg"].offset).encode()
        new = {
            "torn": b"!" + content[1:],
            "beyond": content.replace(last, b"9" * len(last)),
            "other": content.replace(b"jpg", b"png", 1),
        }[damage]
        file.seek(shard.table.offset)
        file.write(new)
    if damage == "other":
        assert any("table of members differs" in fault for fault in verify(copied).faults)
        return
    with pytest.raises(ConfigError, match="the table of its members at byte .* is damaged"):
        open_shard(index, 1)
    assert any("table of its members" in fault for fault in verify(copied).faults)


def test_classes_are_mixed_over_the_shards(shards: ShardIndex) -> None:
    for shard in shards.shards[:-1]:
        tar = TarIndex(shards.directory / shard.name)
        assert {tar.read(i, "cls") for i in range(len(tar))} == {b"0", b"1", b"2"}


def test_captions_of_a_table_and_of_coco_go_through(tmp_path: Path, photo: Callable[..., Image.Image]) -> None:
    for name in ("a.jpg", "b.png"):
        photo(len(name)).save(tmp_path / name)
    (tmp_path / "t.tsv").write_text(
        'title\tfilepath\tlabel\na hat\ta.jpg\thead\nthe "hat"\ta.jpg\thead\nshoe\tb.png\tfoot\n'
    )
    packed = pack(tmp_path / "t.tsv", tmp_path / "table").index
    assert packed.classes == ("foot", "head")
    members = stored(packed)
    assert (members["a"]["txt"], members["a"]["cls"]) == (b'a hat\nthe "hat"', b"1")
    assert members["b"].keys() == {"png", "cls", "txt"}
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(("a.jpg", "b.png"))],
        "annotations": [{"image_id": i, "caption": text} for i, text in ((0, "one"), (0, "two"), (1, "three"))],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    packed = pack(tmp_path / "captions.json", tmp_path / "coco").index
    assert packed.classes is None
    assert {key: files["txt"] for key, files in stored(packed).items()} == {"a": b"one\ntwo", "b": b"three"}
    assert verify(tmp_path / "coco").ok
    assert verify(tmp_path / "table").ok


def test_no_trace_of_the_machine_is_written(shards: ShardIndex, class_folders: Path) -> None:
    for path in shards.directory.iterdir():
        assert str(class_folders.parent).encode() not in path.read_bytes()
    with tarfile.open(shards.directory / shards.shards[0].name) as tar:
        assert {(member.uname, member.gname, member.uid, member.mtime) for member in tar} == {("", "", 0, 0)}


def test_bad_images_are_named_and_refused_above_a_share(tmp_path: Path, photo: Callable[..., Image.Image]) -> None:
    """Unreadable and missing images are named and refused above a share."""
    rows = ["path,caption"]
    for number in range(40):
        photo(number).save(tmp_path / f"{number}.jpg")
        rows.append(f"{number}.jpg,hat {number}")
    (tmp_path / "7.jpg").write_bytes((tmp_path / "7.jpg").read_bytes()[:-100])
    (tmp_path / "8.jpg").write_text("<html>")
    table = tmp_path / "t.csv"
    table.write_text("\n".join([*rows, "gone.jpg,hat"]))
    with pytest.raises(ConfigError, match="3 of 41 images are unreadable or missing") as caught:
        pack(table, tmp_path / "out")
    assert "gone.jpg: no such file" in str(caught.value)
    assert "8.jpg: not an image" in str(caught.value)
    assert not (tmp_path / "out").exists()

    report = pack(table, tmp_path / "out", max_unreadable=0.1)
    assert report.index.samples == 38
    assert [line.partition(":")[0] for line in report.left_out] == ["gone.jpg", "7.jpg", "8.jpg"]
    assert load_index(tmp_path / "out").source["left_out"] == report.left_out


def test_a_sample_without_caption_and_class_is_left_out_by_name(
    tmp_path: Path, photo: Callable[..., Image.Image]
) -> None:
    for name in ("a.jpg", "b.jpg"):
        photo(1).save(tmp_path / name)
    (tmp_path / "t.csv").write_text("path,caption\na.jpg,hat\nb.jpg,\n")
    report = pack(tmp_path / "t.csv", tmp_path / "out", max_unreadable=0.5)
    assert report.left_out == ["b.jpg: no caption"]


def test_files_without_extension_are_packed_by_content(tmp_path: Path, photo: Callable[..., Image.Image]) -> None:
    """Files without a telling name are packed by their content."""
    photo(1).save(tmp_path / "cached", "WEBP")
    (tmp_path / "t.csv").write_text("path,caption\ncached,hat\n")
    assert stored(pack(tmp_path / "t.csv", tmp_path / "out").index)["cached"].keys() == {"webp", "txt"}


def test_a_folder_that_is_not_empty_is_kept_unless_forced(class_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(class_folders, out, samples_per_shard=5)
    with pytest.raises(ConfigError, match="out: not empty; give --force"):
        pack(class_folders, out)
    index = pack(class_folders, out, samples_per_shard=30, force=True).index
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "shard-00000.tar", "shard-00001.tar"]
    assert index.samples == 53


def test_what_was_broken_off_is_no_shard_folder(class_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(class_folders, out, samples_per_shard=20)
    source = read_source(class_folders)
    image = source.samples[-1].image
    assert isinstance(image, Path)
    os.remove(pack_copy := shutil.copy(image, tmp_path / "gone.jpg"))
    broken = Source(
        source.format, source.path, [*source.samples, Sample("gone", "gone", Path(pack_copy), 0)], ["a"] * 3
    )
    with pytest.raises(ConfigError, match=r"gone.jpg: No such file or directory; the shards are incomplete"):
        pack(broken, out, force=True, check="none", samples_per_shard=20)
    with pytest.raises(ConfigError, match="no index.json in it"):
        load_index(out)


def test_a_full_disk_is_told_and_leaves_no_shard_folder(class_folders: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # the disk takes no more than this of one file
    try:
        with pytest.raises(ConfigError, match=r"shard-00000.tar: File too large; the shards are incomplete"):
            pack(class_folders, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []


def test_keys_that_would_run_into_each_other_are_refused(class_folders: Path, tmp_path: Path) -> None:
    image = read_source(class_folders).samples[0].image
    for keys, message in ((("a", "a"), "a2 and a1 have the same key 'a'"), (("a.b", "a"), "'a.b' has a dot")):
        samples = [Sample(key, f"{key}{number}", image, 0) for number, key in enumerate(keys, 1)]
        with pytest.raises(ConfigError, match=message):
            pack(Source("x", tmp_path, samples, ["c"]), tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: os.truncate(folder / "shard-00002.tar", 5000),
            "shard-00002.tar: shorter than its index says: 5000",
        ),
        (lambda folder: (folder / "shard-00001.tar").unlink(), "shard-00001.tar: missing, with 12 samples"),
        (lambda folder: (folder / "shard-00001.tar").open("ab").write(b"x"), "shard-00001.tar: longer than its index"),
        (lambda folder: (folder / "index.json").unlink(), "no index.json in it; `selora pack SOURCE OUT` writes"),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json: damaged"),
        (lambda folder: (folder / "index.json").write_text("[]"), "index.json: damaged"),
        (
            lambda folder: (folder / "index.json").write_text(
                (folder / "index.json").read_text().replace('"samples": 5,', '"samples": 4,')
            ),
            "digest and content disagree",
        ),
        (
            lambda folder: (folder / "index.json").write_text(
                (folder / "index.json").read_text().replace('"version": 1', '"version": 2')
            ),
            "selora-shards 2 is not selora-shards 1",
        ),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_opening_damaged_shards_is_an_error_that_names_them(
    copied: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copied)
    with pytest.raises(ConfigError, match=message):
        load_index(copied)


def test_verify_reports_every_fault_of_the_tars_and_goes_on(copied: Path) -> None:
    os.truncate(copied / "shard-00000.tar", 5000)
    (copied / "shard-00001.tar").unlink()
    with tarfile.open(copied / "shard-00002.tar") as tar:
        middle = tar.getmembers()[6].offset
    with (copied / "shard-00002.tar").open("r+b") as file:
        file.seek(middle + 3)
        file.write(b"\x00\x01\x02")
    with tarfile.open(copied / "shard-00003.tar") as tar:
        image = next(member for member in tar if member.name.endswith(".jpg"))
    with (copied / "shard-00003.tar").open("r+b") as file:
        file.seek(image.offset_data)
        file.write(bytes(BLOCK))
    (copied / "stray.tar").write_bytes(b"")
    report = verify(copied)
    assert not report.ok
    for fault in (
        "stray.tar: not in the index",
        "shard-00000.tar: shorter than its index says",
        "shard-00000.tar: cut off inside",
        "shard-00001.tar: missing, with 12 samples",
        "shard-00002.tar: its content has changed",
        f"shard-00002.tar: damaged header at byte {middle}",
        "shard-00003.tar: its content has changed",
        f"shard-00003.tar/{image.name[:-4]}: not an image",
    ):
        assert fault in str(report)
    assert len(report.faults) == 8
    assert not any("shard-00004" in fault for fault in report.faults)


def test_verify_checks_each_sample(
    shards_of: Callable[..., ShardIndex], photo: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    jpeg = encode(photo(1), "JPEG")
    index = shards_of(
        [
            {"jpg": jpeg, "cls": b"0"},
            {"cls": b"0"},
            {"jpg": jpeg},
            {"jpg": jpeg, "cls": b"1"},
            {"jpg": jpeg[:-50], "cls": b"0"},
        ]
    )
    faults = [fault.partition("/")[2] for fault in verify(index.directory).faults]
    assert faults[:3] == [
        "k001: no image among its members (cls)",
        "k002: neither caption nor class among its members (jpg)",
        "k003: its class '1' is not in the index",
    ]
    assert len(faults) == 4
    assert faults[3].startswith("k004: cannot be decoded (image file is truncated")
    assert len(verify(index.directory, decode=False).faults) == 3


def test_verify_finds_a_key_that_two_shards_hold(copied: Path, reindex: Callable[[ShardIndex], ShardIndex]) -> None:
    index = load_index(copied)
    shutil.copy(copied / "shard-00000.tar", copied / "shard-00001.tar")
    report = verify(reindex(index).directory)
    assert len(report.faults) == 12
    assert all("its key is also in shard-00000.tar" in fault for fault in report.faults)
