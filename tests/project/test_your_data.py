"""Each command of the page "Your own images", on the layout that its authors describe."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.data.shards.index import load_index

PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"
COUNT = 12
Save = Callable[[str], None]


def class_folders(root: Path, save: Save) -> None:
    for number in range(COUNT):
        save(f"photos/{('cat', 'dog')[number % 2]}/{number}.jpg")


def imagenet(root: Path, save: Save) -> None:
    for number in range(COUNT):
        wnid = ("n01440764", "n01443537")[number % 2]
        save(f"ILSVRC/Data/CLS-LOC/train/{wnid}/{wnid}_{number}.JPEG")
    (root / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn01484850 great white shark\n"
    )


def img2dataset_files(root: Path, save: Save) -> None:
    for number in range(COUNT):
        stem = f"laion-files/{number // 6:05d}/{number:09d}"
        save(f"{stem}.jpg")
        (root / f"{stem}.txt").write_text(f"sight {number}")
        (root / f"{stem}.json").write_text(json.dumps({"caption": f"sight {number}", "key": f"{number:09d}"}))
    (root / "laion-files/00000.parquet").write_bytes(b"PAR1")
    (root / "laion-files/00000_stats.json").write_text("{}")


def img2dataset_tars(root: Path, save: Save) -> None:
    save("x.jpg")
    (root / "laion-tars").mkdir()
    for shard in range(2):
        with tarfile.open(root / f"laion-tars/{shard:05d}.tar", "w") as tar:
            for number in range(COUNT // 2):
                members = {"jpg": (root / "x.jpg").read_bytes(), "txt": f"sight {number}".encode(), "json": b"{}"}
                for ext, data in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (root / f"laion-tars/{shard:05d}_stats.json").write_text("{}")


def coco(root: Path, save: Save) -> None:
    images, annotations = [], []
    for number in range(COUNT):
        save(f"coco/train2017/{number:012d}.jpg")
        images.append({"id": number, "file_name": f"{number:012d}.jpg"})
        annotations += [{"id": 9 * number + i, "image_id": number, "caption": f"sight {number} {i}"} for i in range(5)]
    (root / "coco/annotations").mkdir()
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (root / "coco/annotations/captions_train2017.json").write_text(json.dumps(content))


def flickr8k(root: Path, save: Save) -> None:
    lines = ["image,caption"]
    for number in range(COUNT):
        save(f"flickr8k/Images/{number}_ab.jpg")
        lines += [f'{number}_ab.jpg,"A dog , number {number} , runs {i} ."' for i in range(5)]
    (root / "flickr8k/captions.txt").write_text("\n".join(lines) + "\n")


def flickr30k(root: Path, save: Save) -> None:
    lines = ["image_name| comment_number| comment"]
    for number in range(COUNT):
        save(f"flickr30k/flickr30k_images/{number}.jpg")
        lines += [f"{number}.jpg| {i}| Two men , number {number} , are outside {i} ." for i in range(5)]
    (root / "flickr30k/results.csv").write_text("\n".join(lines) + "\n")


def hf_metadata(root: Path, save: Save) -> None:
    lines = []
    for number in range(COUNT):
        save(f"hf/train/{number:04d}.png")
        lines.append(json.dumps({"file_name": f"{number:04d}.png", "text": f"sight {number}"}))
    (root / "hf/train/metadata.jsonl").write_text("\n".join(lines) + "\n")


def flyp(root: Path, save: Save) -> None:
    lines = ["title\tfilepath"]
    for number in range(COUNT):
        name = f"datasets/data/ILSVRC2012/train/n01440764/n01440764_{number}.JPEG"
        save(name)
        lines += [f"a photo of a tench {i}.\t./{name}" for i in range(3)]
    (root / "datasets/csv").mkdir()
    (root / "datasets/csv/imagenet.csv").write_text("\n".join(lines) + "\n")


# Heading -> how the layout is made, classes and captions of an image.
LAYOUTS: dict[str, tuple[Callable[[Path, Save], None], tuple[str, ...] | None]] = {
    "Class folders": (class_folders, ("cat", "dog")),
    "Kaggle ImageNet": (imagenet, ("tench, Tinca tinca", "goldfish, Carassius auratus")),
    "img2dataset, files": (img2dataset_files, None),
    "img2dataset, webdataset": (img2dataset_tars, None),
    "COCO captions": (coco, None),
    "Flickr8k": (flickr8k, None),
    "Flickr30k": (flickr30k, None),
    "Hugging Face imagefolder with metadata": (hf_metadata, None),
    "FLYP csv": (flyp, None),
}
COMMANDS = dict(re.findall(r"^### (.+?)\n.*?```bash\n(.+?)\n```", PAGE.read_text(encoding="utf-8"), re.S | re.M))


def test_each_layout_of_the_page_is_tried() -> None:
    assert COMMANDS.keys() <= LAYOUTS.keys() and len(COMMANDS) == 9


@pytest.mark.parametrize("heading", COMMANDS)
def test_a_stock_layout_is_packed_with_one_command(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.endswith("png") else "JPEG"
        Image.effect_noise((32, 24), 60).convert("RGB").save(tmp_path / name, kind)

    make, classes = LAYOUTS[heading]
    make(tmp_path, save)
    monkeypatch.chdir(tmp_path)
    _, *words = shlex.split(COMMANDS[heading])
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    index = load_index(words[1] if words[0] == "index" else words[2])
    assert (index.samples, index.classes) == (COUNT, classes), said
    assert f" = {COUNT} packed + 0 left out + " in said
    assert main(["verify", str(index.directory)]) == 0
