"""Existing WebDataset tars as a source: from img2dataset, from the hub, or an export of a team."""

from __future__ import annotations

import glob
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.config.text_file import lines_of, read_json, read_text
from pipeline.data.image_files import STORED_EXTENSIONS, BadImageError
from pipeline.data.shards.members import sample_texts
from pipeline.data.sources.account import LeftOut
from pipeline.data.sources.sample import Sample, Source, SourceOptions, few, sample_key, unique_keys
from pipeline.data.sources.walk import hidden, printable
from pipeline.data.storage.remote import is_remote
from pipeline.data.storage.tar import Member, TarIndex
from pipeline.prompts import read_classnames

CLASSNAMES = "classnames.txt"
MOST_TARS = 1_000_000


@dataclass(frozen=True)
class TarImage:
    """The image of a sample, read in place; the tar is open only while it is read."""

    path: Path
    member: Member
    ext: str

    @property
    def suffix(self) -> str:
        return f".{self.ext}"

    def read_bytes(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.member.offset)
            return file.read(self.member.size)


def is_pattern(source: str | Path) -> bool:
    """Whether a source is a pattern of many files: ``shards/{00000..00010}.tar`` or ``shards/*.tar``."""
    return any(mark in str(source) for mark in "{*") and not Path(source).exists()


def holds_tars(path: Path) -> bool:
    """Whether a path is a tar, or a folder with tars directly in it and no other folders."""
    if path.is_file():
        return path.suffix.lower() == ".tar"
    folders = (entry for entry in path.iterdir() if entry.is_dir() and not hidden(entry.name))
    return any(path.glob("*.tar")) and not any(folders)


def tar_files(source: str | Path) -> list[Path]:
    """The tars of a folder, a file or a pattern, sorted by name unless the pattern has an order.

    Raises:
        ConfigError: For missing tars, and for URLs.
    """
    text, path = str(source), Path(source)
    if is_remote(text) or text.startswith("pipe:"):
        raise ConfigError(f"{text}: tars are indexed on a local disk; copy them, or run this where they are")
    if not is_pattern(source):
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    elif "{" in text:
        found = [Path(name) for name in _expanded(text)]
    else:
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207 - may be absolute
    if missing := [str(file) for file in found if not file.is_file()]:
        raise ConfigError(f"{text}: {len(missing)} of {len(found)} tars are missing: {few(missing, 3)}")
    if not found:
        raise ConfigError(f"{text}: no tar there")
    return found


def _expanded(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        found = list(dict.fromkeys(islice(braceexpand(pattern), MOST_TARS + 1)))
    except ValueError as error:
        raise ConfigError(f"{pattern}: braces should be as in shards/{{00000..00010}}.tar ({error})") from error
    if len(found) > MOST_TARS:
        raise ConfigError(f"{pattern}: names more than {MOST_TARS} tars")
    return found


def read_tars(source: str | Path, options: SourceOptions) -> Source:
    """The samples of tars: an image with ``txt`` (a caption per line), ``json`` (its ``caption``) or ``cls`` (a label).

    Class names come from ``--classnames`` or a classnames.txt next to the tars, line = label.

    Raises:
        ConfigError: For a damaged tar, and for labels without names if there is no caption either.
    """
    files = tar_files(source)
    names_file = options.classnames or next(filter(Path.is_file, [files[0].parent / CLASSNAMES]), None)
    names = None if names_file is None else _names(Path(names_file))
    return read_members(Path(source), files, names)


def read_members(source: Path, files: Sequence[Path], names: Sequence[str] | None) -> Source:
    """The samples of the tars ``files``; ``names`` are the classes by label, None if only captions count."""
    samples: list[Sample] = []
    left_out: list[LeftOut] = []
    for file in files:
        tar = TarIndex(file)
        counted = Counter(sample.key for sample in tar.samples)
        for number, found in enumerate(tar.samples):
            made = _sample(tar, number, names)
            if counted[found.key] > 1:
                detail = f"{found.key} occurs {counted[found.key]} times in its tar, here with {found}"
                left_out.append(LeftOut(made.name, "a repeated key", detail))
            elif isinstance(made, LeftOut):
                left_out.append(made)
            else:
                samples.append(made)
        tar.close()
    return Source(
        "webdataset",
        source,
        unique_keys(samples),
        None if names is None else list(names),
        left_out=left_out,
        notes=[f"`selora index {shlex.quote(str(source))}` uses these tars in place, without a copy"],
    )


def _sample(tar: TarIndex, number: int, names: Sequence[str] | None) -> Sample | LeftOut:
    found = tar.samples[number]
    name = printable(f"{tar.path.name}/{found.key}")
    ext = next((ext for ext in STORED_EXTENSIONS if ext in found.members), None)
    if ext is None:
        return LeftOut(name, "no image", f"no image among its members ({found})")
    try:
        label, captions = sample_texts(tar, number, names)
    except BadImageError as error:
        return LeftOut(name, "unreadable caption or class", str(error))
    if not captions and names is None and label >= 0:
        raise ConfigError(
            f"{tar.name}: {printable(found.key)} has the class {label} and no caption; name the classes in "
            f"--classnames FILE, or in a {CLASSNAMES} next to the tars: line 1 for class 0, and so on"
        )
    if not captions and label < 0:
        return LeftOut(name, "neither caption nor class", f"neither caption nor class among its members ({found})")
    image = TarImage(tar.path, found.members[ext], ext)
    return Sample(sample_key(found.key), name, image, label if label >= 0 and names else None, tuple(captions))


def _names(file: Path) -> list[str]:
    """Class names by label, as many as the file has."""
    if file.suffix.lower() == ".json":
        found = read_json(file)
        labels = len(found) if isinstance(found, dict | list) else 0
    else:
        labels = sum(1 for line in lines_of(read_text(file)) if line.strip())
    return read_classnames(file, [str(label) for label in range(labels)])
