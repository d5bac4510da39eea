"""Real-world folders: captions next to images, links, leftovers of systems and tools, names in other codes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features
from requirements import lacking

from pipeline.cli import build_parser, main
from pipeline.config import ConfigError
from pipeline.data.shards.index import load_index, open_shard, pack
from pipeline.data.shards.verify import verify
from pipeline.data.sources.account import MAX_UNREADABLE
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.inspection import inspect
from pipeline.data.sources.sample import Source, SourceOptions

Photo = Callable[..., Image.Image]


@pytest.fixture
def shop(tmp_path: Path, photo: Photo) -> Path:
    """The class folders mug and pan with four images each."""
    root = tmp_path / "shop"
    for number in range(8):
        folder = root / ("mug", "pan")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(number).save(folder / f"{number}.jpg")
    return root


def captioned(root: Path, photo: Photo, count: int = 12) -> Path:
    """img2dataset's output format "files": numbered folders, each image with a txt and a json, tables next to them."""
    for number in range(count):
        shard = f"{number // 6:05d}"
        folder = root / shard
        folder.mkdir(parents=True, exist_ok=True)
        key = f"{shard}{number % 6:04d}"
        photo(number).save(folder / f"{key}.jpg")
        (folder / f"{key}.txt").write_text(f"a sight, number {number}")
        facts = {"caption": f"a sight, number {number}", "url": "http://x/y", "key": key, "status": "success"}
        (folder / f"{key}.json").write_text(json.dumps(facts))
        (root / f"{shard}.parquet").write_bytes(b"PAR1")
        (root / f"{shard}_stats.json").write_text("{}")
    return root


def files_below(root: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(root))


def sums_up(source: Source, root: Path) -> None:
    account = source.account()
    assert account.seen == files_below(root) == account.packed + len(account.left_out) + sum(account.ignored.values())


def test_img2datasets_files_are_read_as_captions(tmp_path: Path, photo: Photo) -> None:
    root = captioned(tmp_path / "laion", photo)
    source = read_source(root)
    assert (source.format, source.classes, len(source.samples)) == ("sidecar", None, 12)
    assert {sample.name: sample.captions for sample in source.samples}["00001/000010005.jpg"] == ("a sight, number 11",)
    assert source.account().ignored == {
        "caption files, read with their images": 24,
        ".parquet files": 2,
        ".json files": 2,
    }
    sums_up(source, root)
    index = pack(root, tmp_path / "shards").index
    assert verify(tmp_path / "shards").ok
    assert sorted(open_shard(index, 0).read(number, "txt").decode() for number in range(12))[0] == "a sight, number 0"


def test_captions_may_be_in_json_alone_or_flat_in_one_folder(tmp_path: Path, photo: Photo) -> None:
    for number, content in enumerate(({"caption": "one"}, {"captions": ["two", "zwei", "two"]}, {"url": "x"}, ["x"])):
        photo(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    source = read_source(tmp_path, SourceOptions(format="sidecar"))
    assert [sample.captions for sample in source.samples] == [("one",), ("two", "zwei")]
    assert [str(each) for each in source.left_out] == [
        "2.png: 2.json holds no caption",
        "3.png: 3.json holds no caption",
    ]
    sums_up(source, tmp_path)


def test_a_caption_file_that_cannot_be_read_leaves_out_its_image(tmp_path: Path, photo: Photo) -> None:
    root = captioned(tmp_path / "laion", photo)
    for file in root.rglob("*.json"):
        file.unlink()
    (root / "00000/000000000.txt").write_bytes(b"caf\xe9")
    (root / "00000/000000001.txt").write_bytes(b" \n\n")
    (root / "00000/000000002.txt").unlink()
    source = read_source(root)
    assert [str(each) for each in source.left_out] == [
        "00000/000000000.jpg: 00000/000000000.txt:1: byte 0xe9 (number 4 of the file) is not UTF-8; "
        "save the file as UTF-8",
        "00000/000000001.jpg: 00000/000000001.txt holds no caption",
        "00000/000000002.jpg: no caption file next to it",
    ]
    assert source.account().reasons == {"no caption": 3}
    sums_up(source, root)


def test_boxes_next_to_images_are_not_captions(shop: Path) -> None:
    for image in shop.rglob("*.jpg"):
        image.with_suffix(".txt").write_text("0 0.5 0.5 0.25 0.125\n")
    source = read_source(shop)
    assert (source.format, source.classes) == ("imagefolder", ["mug", "pan"])
    assert source.account().ignored == {".txt files": 8}
    assert source.notes == ["8 images have a text file next to them; --format sidecar takes it as their captions"]


def test_files_that_are_not_looked_at_are_counted_by_kind(shop: Path, photo: Photo, tmp_path: Path) -> None:
    for name in ("mug/a.heic", "mug/b.HEIC", "pan/c.jp2", "pan/more.zip", "mug/notes.md", "pan/README"):
        (shop / name).write_bytes(b"x")
    for number in range(3):
        photo(number).save(shop / f"loose{number}.jpg")
    source = read_source(shop)
    assert len(source.samples) == 8
    assert source.account().ignored == {
        ".heic files": 2,
        ".jp2 files": 1,
        ".zip files": 1,
        ".md files": 1,
        "files without an extension": 1,
        "images next to the class folders": 3,
    }
    sums_up(source, shop)
    assert source.notes == [
        "not read: 2 .heic, 1 .jp2, 1 .zip; unpack archives and convert images to jpg, png or webp to pack them",
        "3 images next to the class folders have no class: loose0.jpg, loose1.jpg, loose2.jpg",
    ]
    packed = str(pack(shop, tmp_path / "shards").account)
    assert "17 seen = 8 packed + 0 left out + 9 ignored\n" in packed
    seen = str(inspect(shop))
    assert "17 seen = 8 to pack + 0 left out + 9 ignored\n" in seen
    for text in (seen, packed):
        assert "  2 ignored: .heic files" in text


def test_avif_is_packed_like_any_other_image(shop: Path, photo: Photo, tmp_path: Path) -> None:
    if not features.check("avif"):
        lacking("avif", "this Pillow cannot read AVIF")
    photo(9).save(shop / "mug/new.avif")
    index = pack(shop, tmp_path / "shards").index
    assert index.samples == 9
    assert verify(tmp_path / "shards").ok


def test_each_real_folder_is_read_once_and_links_are_named(shop: Path, tmp_path: Path) -> None:
    (shop / "mug/up").symlink_to("..")
    (shop / "mug/a_sibling").symlink_to(shop / "pan")
    (shop / "pan/itself").symlink_to(".")
    (shop / "pan/above").symlink_to(tmp_path)
    source = read_source(shop)
    assert [(sample.name, sample.cls) for sample in source.samples] == [
        *((f"mug/{n}.jpg", 0) for n in (0, 2, 4, 6)),
        *((f"pan/{n}.jpg", 1) for n in (1, 3, 5, 7)),
    ]
    assert source.account().ignored == {"links to folders that are read elsewhere": 4}
    assert source.account().seen == 12
    assert all(f"{link} -> " in source.notes[0] for link in ("mug/up", "mug/a_sibling", "pan/itself", "pan/above"))


def test_links_out_of_the_source_are_followed(shop: Path, tmp_path: Path, photo: Photo) -> None:
    store = tmp_path / "store"
    (store / "deep").mkdir(parents=True)
    photo(20).save(store / "x.jpg")
    photo(21).save(store / "deep/y.jpg")
    (store / "deep/round").symlink_to(store)
    (shop / "vase").symlink_to(store)
    (shop / "mug/z.jpg").symlink_to(store / "x.jpg")
    (shop / "mug/gone.jpg").symlink_to(store / "nowhere.jpg")
    source = read_source(shop)
    assert source.classes == ["mug", "pan", "vase"]
    names = [sample.name for sample in source.samples if sample.cls == 2]
    assert names == ["vase/x.jpg", "vase/deep/y.jpg"]
    assert "mug/z.jpg" in [sample.name for sample in source.samples]
    assert [str(each) for each in source.left_out] == ["mug/gone.jpg: link to a missing file"]
    (shop / "urn").symlink_to(store)
    with pytest.raises(ConfigError, match=r"vase: .* holds no image .*read as another class already"):
        read_source(shop)


def test_folders_and_files_of_systems_are_skipped_and_counted(shop: Path, photo: Photo) -> None:
    for folder in ("mug/@eaDir/0.jpg", "pan/.ipynb_checkpoints", "pan/deep/__MACOSX", "__MACOSX/mug", ".thumbnails"):
        (shop / folder).mkdir(parents=True)
        photo(1).save(shop / folder / "t.jpg")
    photo(2).save(shop / "mug/._0.jpg", "JPEG")
    for name in ("mug/Thumbs.db", "pan/desktop.ini", ".DS_Store"):
        (shop / name).write_bytes(b"")
    source = read_source(shop)
    assert source.classes == ["mug", "pan"]
    assert len(source.samples) == 8
    assert source.account().ignored == {"hidden and system files": 9}
    sums_up(source, shop)


def test_names_that_are_not_utf8_are_packed_under_escaped_keys(
    shop: Path, photo: Photo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(30).save(os.fsencode(shop) + b"/mug/caf\xe9.jpg", "JPEG")
    photo(31).save(os.fsencode(shop) + b"/mug/caf\xe8.jpg", "JPEG")
    assert main(["inspect", str(shop)]) == 0
    assert main(["pack", str(shop), str(tmp_path / "shards"), "--report", str(tmp_path / "report.json")]) == 0
    assert main(["verify", str(tmp_path / "shards")]) == 0
    index = load_index(tmp_path / "shards")
    assert index.samples == 10
    keys = {sample.key for number in range(len(index.shards)) for sample in open_shard(index, number).samples}
    assert len({key for key in keys if key.startswith("mug/caf_")}) == 2
    assert r"mug/caf\xe9.jpg" in [sample.name for sample in read_source(shop).samples]
    assert main(["pack", str(shop), str(tmp_path / "eval"), "--eval"]) == 0


def test_a_class_folder_that_is_not_utf8_is_refused(shop: Path) -> None:
    """A class folder that is not UTF-8 is refused with the way out."""
    os.rename(os.fsencode(shop / "mug"), os.fsencode(shop) + b"/th\xe9")
    with pytest.raises(ConfigError, match=r"shop/th\\xe9: the folder's name is not UTF-8.* rename it"):
        read_source(shop)


def test_twin_folders_in_two_unicode_forms_are_told_apart(shop: Path, photo: Photo) -> None:
    """A Mac and a PC wrote to one disk: both folders read thé."""
    for name in ("th\u00e9", "the\u0301"):
        (shop / name).mkdir()
        photo(3).save(shop / name / "x.jpg")
    with pytest.raises(ConfigError, match=r"2 classes read 'thé' \('the\\u0301', 'thé'\); rename or merge them"):
        read_source(shop)


def test_a_folder_with_a_list_is_not_told_to_be_thrown_away(shop: Path) -> None:
    (shop / "annotations").mkdir()
    (shop / "annotations/captions_val.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"shop/annotations: no image, but annotations/captions_val.json; if that f"):
        read_source(shop)


def test_unreadable_images_that_inspect_opens_are_left_out(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = (shop / "pan/7.jpg").read_bytes()
    (shop / "pan/8.jpg").write_bytes(torn[: len(torn) // 2])
    (shop / "pan/9.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "shop", "--report", "report.json"]) == 0
    text = capsys.readouterr().out
    assert "pan/8.jpg | unreadable | class 1 'pan'\n" in text
    assert "note: 1 of the 5 images that were opened cannot be read; pack decodes every image" in text
    assert "10 seen = 9 to pack + 1 left out + 0 ignored\n  1 left out, unreadable image: pan/8.jpg" in text
    assert json.loads(Path("report.json").read_text())["left_out"] == {"unreadable image": 1}
    assert "  selora pack shop shards/shop\n" in text  # one of five is too little evidence for a larger share
    assert main(["pack", "shop", "--max-unreadable", "0.2", "shards/shop"]) == 0


def test_a_share_at_the_limit_is_accepted(shop: Path, tmp_path: Path) -> None:
    """29 of 50, although 0.58 * 50 is less than 29 in floating point."""
    image = (shop / "pan/7.jpg").read_bytes()
    folder = tmp_path / "half" / "a"
    folder.mkdir(parents=True)
    for number in range(50):
        (folder / f"{number}.jpg").write_bytes(image if number < 21 else b"")
    assert pack(folder.parent, tmp_path / "shards", max_unreadable=0.58).index.samples == 21
    with pytest.raises(ConfigError, match="29 of 50 images are unreadable or missing"):
        pack(folder.parent, tmp_path / "others", max_unreadable=0.57)


def test_the_limit_of_the_command_is_that_of_the_functions() -> None:
    assert build_parser().parse_args(["pack", "a", "b"]).max_unreadable == MAX_UNREADABLE


def test_the_report_names_what_the_summary_counts(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        (shop / f"mug/bad{number}.jpg").write_bytes(b"nothing")
    (shop / "mug/notes.md").write_text("mine")
    report = tmp_path / "report.json"
    command = ["pack", str(shop), str(tmp_path / "shards"), "--max-unreadable", "0.9", "--report", str(report)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "16 seen = 8 packed + 7 left out + 1 ignored\n" in text
    assert "  7 left out, unreadable image: mug/bad0.jpg: not an image, " in text and " and 2 more" in text
    content = json.loads(report.read_text())
    assert (content["seen"], content["packed"], content["left_out"], content["ignored"]) == (
        16,
        8,
        {"unreadable image": 7},
        {".md files": 1},
    )
    assert [each["name"] for each in content["names"]] == [f"mug/bad{number}.jpg" for number in range(7)]
    assert content["classes"] == [{"folder": "mug", "name": "mug"}, {"folder": "pan", "name": "pan"}]
    assert main(["verify", str(tmp_path / "shards")]) == 0
    assert "16 seen = 8 packed + 7 left out + 1 ignored\n" in capsys.readouterr().out
    assert main(["inspect", str(shop), "--report", str(tmp_path / "no/where.json")]) == 2
    assert "--report" in capsys.readouterr().err
