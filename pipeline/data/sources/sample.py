"""The result of every reader of a source: samples with their keys, and everything that is not a sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal, Protocol

from pipeline.data.image_files import IMAGE_EXTENSIONS
from pipeline.data.sources.account import Account, LeftOut

Format = Literal["auto", "imagefolder", "sidecar", "csv", "json", "coco", "webdataset"]
Quotes = Literal["auto", "csv", "none"]


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source; each field is an option of `selora inspect` and `selora pack` with the same name.

    Attributes:
        format: ``auto`` detects the format.
        classnames: Text file with readable class names (see prompts.read_classnames).
        image_column: Column of a table with image paths; detected unless given, like the next two.
        caption_column: Column with captions.
        class_column: Column with classes.
        image_root: The only folder in which the images of a table or a JSON file are searched.
        encoding: Encoding of tables, JSON and class names that are not UTF-8.
        quotes: Quotes in a table: ``csv`` if they enclose fields, ``none`` if they are ordinary characters.
    """

    format: Format = "auto"
    classnames: str | Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    class_column: str | None = None
    image_root: str | Path | None = None
    encoding: str | None = None
    quotes: Quotes = "auto"


class ImageFile(Protocol):
    """The interface of an image's file; a path has it, and an image that a dataset stores as an array."""

    @property
    def suffix(self) -> str: ...

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Sample:
    """One image with its class, its captions or both. ``name`` is its name for the user: a path inside the source."""

    key: str
    name: str
    image: ImageFile
    cls: int | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Everything a source holds.

    Attributes:
        format: Format as which it was read.
        path: Its path.
        samples: Samples that can be packed, in a stable order.
        classes: Readable names by label, None if samples have captions only.
        left_out: Intended samples that cannot be packed: a missing file, no caption.
        ignored: Kind -> number of files that were never intended as samples.
        seen: Number of files or named images, counted independently by the reader; None: the sum of the above.
        folders: Folder or label as the user wrote it, by label, if there are classes.
        notes: Notes for the user on how the source was read, a sentence each.
    """

    format: str
    path: Path
    samples: list[Sample]
    classes: list[str] | None = None
    left_out: Sequence[LeftOut] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    seen: int | None = None
    folders: Sequence[str] = ()
    notes: Sequence[str] = ()

    def account(self, unusable: Sequence[LeftOut] = ()) -> Account:
        """The account of the source, with the samples in ``unusable`` also left out."""
        left_out = (*self.left_out, *unusable)
        packed = len(self.samples) - len(unusable)
        seen = packed + len(left_out) + sum(self.ignored.values()) if self.seen is None else self.seen
        return Account(seen, packed, left_out, self.ignored)


def sample_key(name: str) -> str:
    """A key for the tar that resembles ``name``; other characters are replaced, and a digest keeps it unique."""
    stem = name.rsplit(".", 1)[0] if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS else name
    # webdataset treats __double__ underscores as metadata of the archive, and ustar holds 100 bytes.
    clean = re.sub(r"(^|/)__+", r"\1_", re.sub(r"[^A-Za-z0-9_/-]+", "_", stem)).strip("/")
    if clean == stem and len(clean) <= 80:
        return clean
    return f"{clean[-60:].strip('/')}-{_digest(name)}"


def unique_keys(samples: Iterable[Sample]) -> list[Sample]:
    """Samples with a digest added to keys that two names share (a.jpg and a.png); other keys are unchanged."""
    listed = list(samples)
    counts = Counter(sample.key for sample in listed)
    return [
        sample if counts[sample.key] == 1 else replace(sample, key=f"{sample.key}-{_digest(sample.name)}")
        for sample in listed
    ]


def few(names: Sequence[str], count: int) -> str:
    """The first ``count`` names, and the number of further ones."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _digest(name: str) -> str:
    # A file name that is not UTF-8 has lone surrogates.
    return blake2b(name.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
