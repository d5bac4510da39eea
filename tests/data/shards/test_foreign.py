"""WebDataset tars of other tools: used in place, or packed again, and counted in both cases."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.config import ConfigError
from pipeline.data.shards.foreign import index_tars
from pipeline.data.shards.index import load_index, open_shard, pack
from pipeline.data.shards.verify import verify
from pipeline.data.sources.sample import SourceOptions
from pipeline.data.train.stream import TrainDataset

Members = dict[str, bytes]


@pytest.fixture
def jpeg(photo: Callable[..., Image.Image], encode: Callable[..., bytes]) -> Callable[[int], bytes]:
    return lambda seed: encode(photo(seed), "JPEG")


def write(path: Path, samples: dict[str, Members]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def captioned(jpeg: Callable[[int], bytes], numbers: range) -> dict[str, Members]:
    """img2dataset's webdataset format: key.jpg, key.txt, key.json."""
    return {
        f"{number:09d}": {
            "jpg": jpeg(number),
            "txt": f"sight {number}".encode(),
            "json": json.dumps({"caption": f"sight {number}", "status": "success"}).encode(),
        }
        for number in numbers
    }


def test_img2dataset_tars_are_indexed_and_trained_on(
    tmp_path: Path, jpeg: Callable[[int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Img2dataset's tars are indexed as they are and trained on."""
    for shard in range(2):
        write(tmp_path / f"laion/{shard:05d}.tar", captioned(jpeg, range(10 * shard, 10 * shard + 10)))
        (tmp_path / f"laion/{shard:05d}_stats.json").write_text("{}")
        (tmp_path / f"laion/{shard:05d}.parquet").write_bytes(b"PAR1")
    before = (tmp_path / "laion/00000.tar").read_bytes()
    with pytest.raises(ConfigError, match=r"laion: no index.json in it; `selora index .*laion` takes its tars"):
        load_index(tmp_path / "laion")
    assert main(["index", str(tmp_path / "laion")]) == 0
    assert "20 seen = 20 packed + 0 left out + 0 ignored" in capsys.readouterr().out
    assert (tmp_path / "laion/00000.tar").read_bytes() == before
    index = load_index(tmp_path / "laion")
    assert (index.samples, index.classes, index.sizes()) == (20, None, [10, 10])
    assert verify(tmp_path / "laion").ok
    data = TrainDataset(index, size=32, seed=0, streams=2, window=8)
    assert {data[position].caption for position in range(20)} == {f"sight {number}" for number in range(20)}
    assert main(["index", str(tmp_path / "laion")]) == 2
    assert "give --force to replace it" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "laion"), "--force"]) == 0


def test_a_brace_pattern_names_a_missing_tar(tmp_path: Path, jpeg: Callable[[int], bytes]) -> None:
    """A pattern of braces takes those tars and names a missing one."""
    for shard in range(12):
        write(tmp_path / f"{shard:03d}.tar", captioned(jpeg, range(shard, shard + 1)))
    with pytest.raises(ConfigError, match=r"1 of 13 tars are missing: .*012.tar"):
        index_tars(f"{tmp_path}/{{000..012}}.tar")
    with pytest.raises(ConfigError, match=r"`selora index '.*'` writes the index.json"):
        load_index(f"{tmp_path}/{{000..010}}.tar")
    made = index_tars(f"{tmp_path}/{{000..010}}.tar").index
    assert [shard.name for shard in made.shards] == [f"{shard:03d}.tar" for shard in range(11)]
    assert load_index(tmp_path).samples == 11
    assert index_tars(f"{tmp_path}/*.tar", force=True).index.samples == 12
    assert pack(f"{tmp_path}/{{000,001,0{{02..04}}}}.tar", tmp_path / "packed").index.samples == 5
    for pattern, message in (("{000..", "braces"), ("{0..9999999}.tar", "more than"), ("{x}.tar", "are missing")):
        with pytest.raises(ConfigError, match=message):
            index_tars(f"{tmp_path}/{pattern}")
    write(tmp_path / "sub/000.tar", captioned(jpeg, range(3)))
    with pytest.raises(ConfigError, match="tars of one folder make an index"):
        index_tars(f"{tmp_path}/{{.,sub}}/000.tar", force=True)
    with pytest.raises(ConfigError, match="indexed on a local disk"):
        index_tars("pipe:aws s3 cp s3://x/{00..11}.tar -")


def test_labels_need_names_and_take_them_from_a_file(tmp_path: Path, jpeg: Callable[[int], bytes]) -> None:
    samples = {f"s{number}": {"webp": jpeg(number), "cls": str(number % 3).encode()} for number in range(6)}
    write(tmp_path / "in/000.tar", samples)
    with pytest.raises(ConfigError, match=r"000.tar: s0 has the class 0 and no caption; name the classes in --classn"):
        index_tars(tmp_path / "in")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    made = index_tars(tmp_path / "in", options=SourceOptions(classnames=tmp_path / "names.txt"))
    assert made.index.classes == ("cat", "dog", "owl")
    (tmp_path / "in/classnames.txt").write_text("cat\ndog\nowl\nnewt\n")
    assert index_tars(tmp_path / "in", force=True).index.classes == ("cat", "dog", "owl", "newt")
    (tmp_path / "in/classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match=r"2 of 6 images .*\n.*000.tar/s2: its class '2' is not in the index"):
        index_tars(tmp_path / "in", force=True)


def test_each_sample_that_cannot_be_used_is_named_and_counted(
    tmp_path: Path, jpeg: Callable[[int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    good = captioned(jpeg, range(8))
    bad: dict[str, Members] = {
        "text": {"txt": b"no image"},
        "alone": {"jpg": jpeg(1)},
        "broken": {"jpg": b"nothing", "txt": b"x"},
        "latin": {"png": jpeg(2), "txt": b"caf\xe9"},
        "empty": {"jpg": jpeg(3), "txt": b"\n", "json": b"{}"},
        "notjson": {"jpg": jpeg(3), "json": b"{"},
    }
    write(tmp_path / "in/0.tar", {**good, **bad})
    with tarfile.open(write(tmp_path / "in/1.tar", captioned(jpeg, range(2))), "a") as tar:
        info = tarfile.TarInfo("000000000.cls")
        tar.addfile(info)
    with pytest.raises(ConfigError, match="8 of 17 images are unreadable or missing; --max-unreadable allows"):
        index_tars(tmp_path / "in")
    made = index_tars(tmp_path / "in", max_unreadable=0.6)
    assert (made.account.seen, made.account.packed, made.index.samples) == (17, 9, 17)
    assert sorted(each.name for each in made.account.left_out) == [
        *(f"0.tar/{key}" for key in sorted(bad)),
        "1.tar/000000000",
        "1.tar/000000000",
    ]
    packed = pack(tmp_path / "in/0.tar", tmp_path / "out", max_unreadable=0.6)
    assert (packed.account.seen, packed.index.samples) == (14, 8)
    assert verify(tmp_path / "out").ok
    data = TrainDataset(load_index(tmp_path / "in"), size=32, seed=0, streams=1, window=4)
    batch = [data[position] for position in range(17)]
    assert sum(bool(sample.bad) for sample in batch) == 7 and all(sample.caption for sample in batch)


def test_captions_in_json_alone_are_read_in_training_too(tmp_path: Path, jpeg: Callable[[int], bytes]) -> None:
    captions = json.dumps({"captions": ["one", "eins"]}).encode()
    write(tmp_path / "in/0.tar", {"a": {"jpeg": jpeg(0), "json": captions}, "b": {"png": jpeg(1), "json": captions}})
    index = index_tars(tmp_path / "in").index
    assert verify(tmp_path / "in").ok
    data = TrainDataset(index, size=32, seed=0, streams=1, window=4)
    assert {data[position].caption for position in range(4)} == {"one", "eins"}
    packed = pack(tmp_path / "in/0.tar", tmp_path / "out").index
    assert open_shard(packed, 0).read(0, "txt") == b"one\neins"


def test_tars_next_to_class_folders_are_not_the_data(tmp_path: Path, jpeg: Callable[[int], bytes]) -> None:
    write(tmp_path / "in/backup.tar", captioned(jpeg, range(3)))
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir()
        (tmp_path / "in" / name / "0.jpg").write_bytes(jpeg(1))
    report = pack(tmp_path / "in", tmp_path / "out")
    assert (report.source.format, report.index.samples) == ("imagefolder", 2)
    assert report.account.ignored == {".tar files": 1}


def test_a_member_whose_name_is_not_utf8_is_written_escaped(tmp_path: Path, jpeg: Callable[[int], bytes]) -> None:
    write(tmp_path / "in/0.tar", {"a": {"jpg": jpeg(0), "txt": b"x"}, "b": {"\udcff": b"?"}})
    made = index_tars(tmp_path / "in", max_unreadable=0.5)
    assert made.left_out == [r"0.tar/b: no image among its members (\udcff)"]
    assert load_index(tmp_path / "in").source["left_out"] == made.left_out
