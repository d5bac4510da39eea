"""What users have on disk -> a list of samples: class folders, csv/tsv (FLYP's too), COCO captions json."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.images import IMAGE_EXTENSIONS
from pipeline.prompts import read_classnames, readable_name

Format = Literal["auto", "imagefolder", "csv", "coco"]

IMAGE_COLUMNS = ("filepath", "image_path", "path", "image", "file", "filename", "file_name", "img", "img_path")
CAPTION_COLUMNS = ("title", "caption", "captions", "text", "sentence", "prompt", "description")
CLASS_COLUMNS = ("class", "classname", "class_name", "label", "category", "cls", "target")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}


class ImageFile(Protocol):
    """What is asked of the file of an image: a path has it, and so has an image that a dataset keeps as an array."""

    @property
    def suffix(self) -> str: ...

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Sample:
    """One image with its class, its captions or both. ``name`` is what the user calls it: a path inside the source."""

    key: str
    name: str
    image: ImageFile
    cls: int | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Everything a source holds. ``classes``: readable names by label. ``missing``: names of images that are not there,
    or have no caption in a COCO file. ``ignored``: how many files are no images."""

    format: str
    path: Path
    samples: list[Sample]
    classes: list[str] | None = None
    missing: list[str] = field(default_factory=list)
    ignored: int = 0


def read_source(
    source: str | Path,
    format: Format = "auto",  # noqa: A002 - the word of the command line
    *,
    classnames: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    class_column: str | None = None,
) -> Source:
    """The samples of ``source`` in a stable order (sorted by name for folders, file order for lists).

    ``classnames`` is a text file with readable names (see prompts.read_classnames); columns are sniffed unless given.
    Raises ConfigError when the source is none of the known formats or is inconsistent.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    kind = sniff(path) if format == "auto" else format
    if kind == "imagefolder":
        return _read_folders(path, classnames)
    if kind == "csv":
        return _read_table(path, classnames, image_column, caption_column, class_column)
    return _read_coco(path)


def sniff(path: Path) -> Literal["imagefolder", "csv", "coco"]:
    """The format of a source by its look; ConfigError with what was seen when it is none."""
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv", ".txt"):
            return "csv"
        if suffix == ".json":
            return "coco"
        raise ConfigError(f"{path}: not a csv, tsv or json file; give a folder of class folders or one of these files")
    if (path / "index.json").exists():
        raise ConfigError(f"{path}: these are packed shards already (index.json); use them as data.train")
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if folders and all(entry.name.lower() in SPLIT_NAMES for entry in folders):
        names = ", ".join(entry.name for entry in folders)
        one = next((entry for entry in folders if entry.name.lower().startswith("train")), folders[0])
        raise ConfigError(f"{path}: its folders look like splits ({names}), not classes; take one: {one}")
    if not folders:
        raise ConfigError(
            f"{path}: no class folders in it; expected {path}/CLASS/IMAGE, or a csv with path and caption"
        )
    return "imagefolder"


def sample_key(name: str) -> str:
    """A key for the tar that still reads like ``name``; other characters are replaced and a digest keeps it unique."""
    stem = name.rsplit(".", 1)[0] if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS else name
    # webdataset takes __double__ underscores for a remark about the archive, and ustar holds 100 bytes.
    clean = re.sub(r"(^|/)__+", r"\1_", re.sub(r"[^A-Za-z0-9_/-]+", "_", stem)).strip("/")
    if clean == stem and len(clean) <= 80:
        return clean
    return f"{clean[-60:].strip('/')}-{blake2b(name.encode(), digest_size=6).hexdigest()}"


def _unique_keys(samples: Iterable[Sample]) -> list[Sample]:
    """Samples with a digest added to the keys that two names share (a.jpg and a.png); the rest keep theirs."""
    listed = list(samples)
    counts = Counter(sample.key for sample in listed)
    return [
        sample
        if counts[sample.key] == 1
        else Sample(
            f"{sample.key}-{blake2b(sample.name.encode(), digest_size=6).hexdigest()}",
            sample.name,
            sample.image,
            sample.cls,
            sample.captions,
        )
        for sample in listed
    ]


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def _read_folders(root: Path, classnames: str | Path | None) -> Source:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    samples: list[Sample] = []
    ignored = 0
    for label, folder in enumerate(folders):
        before = len(samples)
        for directory, below, files in os.walk(root / folder, followlinks=True):
            below.sort()
            for file in sorted(files):
                path = Path(directory) / file
                if not _is_image(path):
                    ignored += not file.startswith(".")
                    continue
                name = path.relative_to(root).as_posix()
                samples.append(Sample(sample_key(name), name, path, label))
        if len(samples) == before:
            raise ConfigError(f"{root / folder}: the class folder holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    return Source("imagefolder", root, _unique_keys(samples), _class_names(folders, classnames), ignored=ignored)


def _class_names(folders: Sequence[str], classnames: str | Path | None) -> list[str]:
    names = read_classnames(classnames, folders) if classnames else [readable_name(folder) for folder in folders]
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"classes: {count} classes read {name!r}; give a classnames file that tells them apart")
    return names


def _read_table(
    path: Path,
    classnames: str | Path | None,
    image_column: str | None,
    caption_column: str | None,
    class_column: str | None,
) -> Source:
    columns, rows = _rows(path)
    image_at = _column(path, columns, image_column, IMAGE_COLUMNS, "an image column (--image-column)")
    caption_at = _column(path, columns, caption_column, CAPTION_COLUMNS, None)
    class_at = _column(path, columns, class_column, CLASS_COLUMNS, None)
    if image_at is None or (caption_at is None and class_at is None):
        known = f"captions: {', '.join(CAPTION_COLUMNS)}; classes: {', '.join(CLASS_COLUMNS)}"
        raise ConfigError(f"{path}: no caption and no class column among {', '.join(columns)} (known names: {known})")
    captions: dict[str, list[str]] = {}
    classes: dict[str, str] = {}
    for line, row in rows:
        if len(row) != len(columns):
            raise ConfigError(
                f"{path}:{line}: {len(row)} fields where the header has {len(columns)} ({', '.join(columns)})"
            )
        name = row[image_at].strip()
        if not name:
            raise ConfigError(f"{path}:{line}: the {columns[image_at]!r} field is empty")
        # FLYP writes a row for each image and template: the rows of one image are its captions.
        mine = captions.setdefault(name, [])
        if caption_at is not None and (text := " ".join(row[caption_at].split())) and text not in mine:
            mine.append(text)
        if class_at is not None and classes.setdefault(name, row[class_at].strip()) != row[class_at].strip():
            raise ConfigError(f"{path}:{line}: {name} has the classes {classes[name]!r} and {row[class_at].strip()!r}")
    folders = sorted(set(classes.values()), key=lambda c: (0, int(c), "") if c.isdecimal() else (1, 0, c))
    label_of = {folder: label for label, folder in enumerate(folders)}
    samples, missing = [], []
    for name, texts in captions.items():
        image = path.parent / name
        if not image.is_file():
            missing.append(name)
            continue
        cls = label_of[classes[name]] if class_at is not None else None
        samples.append(Sample(sample_key(name), name, image, cls, tuple(texts)))
    names = _class_names(folders, classnames) if class_at is not None else None
    return Source("csv", path, _unique_keys(samples), names, missing)


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, fields) of a table; the delimiter is the one the header uses."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max("\t,;|", key=header.count)
        # FLYP's files come from pandas.to_csv(sep="\t"), so quotes mean quoting there too.
        reader = csv.reader(file, delimiter=delimiter)
        rows = [(reader.line_num, row) for row in reader if row]
    if len(rows) < 2:
        raise ConfigError(f"{path}: a header and at least one row are needed, {len(rows)} lines found")
    return [column.strip() for column in rows[0][1]], rows[1:]


def _column(path: Path, columns: list[str], wanted: str | None, known: Sequence[str], need: str | None) -> int | None:
    if wanted is not None:
        if wanted not in columns:
            raise ConfigError(f"{path}: no column {wanted!r}; the columns are {', '.join(columns)}")
        return columns.index(wanted)
    lower = [column.lower() for column in columns]
    for name in known:
        if name in lower:
            return lower.index(name)
    if need is not None:
        raise ConfigError(f"{path}: {need} is needed; the columns are {', '.join(columns)}, known: {', '.join(known)}")
    return None


def _read_coco(path: Path) -> Source:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not json: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: COCO captions need 'images' and 'annotations', found: {found}")
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise ConfigError(f"{path}: an annotation has no 'caption'; give a captions_*.json, not instances_*.json")
        captions.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
    samples, missing = [], []
    for image in content["images"]:
        name = str(image["file_name"])
        file = _coco_image(path, name)
        if file is None or not captions.get(image["id"]):
            missing.append(name)
            continue
        samples.append(Sample(sample_key(name), name, file, None, tuple(captions[image["id"]])))
    return Source("coco", path, _unique_keys(samples), None, missing)


def _coco_image(path: Path, name: str) -> Path | None:
    """Beside the json, in its ``images`` folder, or as COCO has it: ../train2017 for captions_train2017.json."""
    split = path.stem.rpartition("_")[2]
    for folder in (
        path.parent,
        path.parent / "images",
        path.parent.parent / split,
        path.parent.parent / "images" / split,
    ):
        if (folder / name).is_file():
            return folder / name
    return None


@dataclass(frozen=True)
class Inspection:
    """What inspect saw. As text: counts, classes, five samples, and the command and config lines that come next."""

    source: Source
    samples: list[str]
    command: str
    config: str

    def __str__(self) -> str:
        found = self.source
        lines = [f"{found.path}: {found.format}, {len(found.samples)} images"]
        if found.classes is not None:
            counts = Counter(sample.cls for sample in found.samples)
            sizes = sorted((counts[label], name) for label, name in enumerate(found.classes))
            lines.append(
                f"  {len(sizes)} classes, {sizes[0][0]} images ({sizes[0][1]}) to {sizes[-1][0]} ({sizes[-1][1]})"
            )
            lines.append(f"  classes: {_few(found.classes, 20)}")
        own = [len(sample.captions) for sample in found.samples if sample.captions]
        if own:
            lines.append(f"  {sum(own)} captions of their own, {min(own)} to {max(own)} an image")
        if found.missing:
            lines.append(f"  {len(found.missing)} not usable (no such file, or no caption): {_few(found.missing, 5)}")
        if found.ignored:
            lines.append(f"  {found.ignored} files ignored, which are no images by their names")
        lines += ["samples:", *(f"  {sample}" for sample in self.samples)]
        lines += ["next:", f"  {self.command}", "config:", *(f"  {line}" for line in self.config.splitlines())]
        return "\n".join(lines)


def inspect(
    source: str | Path,
    format: Format = "auto",  # noqa: A002 - the word of the command line
    *,
    classnames: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    class_column: str | None = None,
) -> Inspection:
    """Look at a source without writing anything. Raises ConfigError where read_source does."""
    columns = {"image_column": image_column, "caption_column": caption_column, "class_column": class_column}
    found = read_source(source, format, classnames=classnames, **columns)
    if not found.samples:
        raise ConfigError(
            f"{found.path}: none of its {len(found.missing)} images can be used: {_few(found.missing, 5)}"
        )
    step = max(1, len(found.samples) // 5)
    samples = [_describe(sample, found.classes) for sample in found.samples[::step][:5]]
    shards = f"shards/{re.sub(r'[^A-Za-z0-9_-]+', '-', found.path.resolve().stem)}"
    given = {"format": None if format == "auto" else format, "classnames": classnames, **columns}
    options = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items() if value]
    command = " ".join(["selora pack", shlex.quote(str(source)), *options, shlex.quote(shards)])
    lines = ["data:", f"  train: {shards}"]
    if any(not sample.captions for sample in found.samples):
        lines.append("  templates: openai  # sentences about the class; or a list of your own with {c}")
    if len(found.samples) < 5120:
        batch = max(8, 2 ** ((len(found.samples) // 10).bit_length() - 1))
        lines += [f"  streams: {min(64, batch)}", "train:", f"  global_batch_size: {batch}  # of few images"]
    return Inspection(found, samples, command, "\n".join(lines))


def _describe(sample: Sample, classes: Sequence[str] | None) -> str:
    try:
        with Image.open(io.BytesIO(sample.image.read_bytes())) as image:
            look = f"{image.format} {image.width} x {image.height} {image.mode}"
    except (OSError, SyntaxError, ValueError):
        look = "unreadable"
    parts = [sample.name, look]
    if sample.cls is not None and classes is not None:
        parts.append(f"class {sample.cls} {classes[sample.cls]!r}")
    if sample.captions:
        parts.append(f"{sample.captions[0]!r}")
    return " | ".join(parts)


def _few(names: Sequence[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
