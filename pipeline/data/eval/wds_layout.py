"""Evaluation sets in the layout of huggingface.co/clip-benchmark (`wds_*` folders): reading, and writing user data.

NAME/classnames.txt                          one class per line, label = line; only for classification
NAME/zeroshot_classification_templates.txt   one sentence with {c} per line
NAME/dataset_type.txt                        "retrieval"; absent or "classification" otherwise
NAME/test/nshards.txt, 0.tar, 1.tar ..       members KEY.webp|png|jpg and KEY.cls or KEY.txt (one caption per line)
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from pipeline.config import ConfigError
from pipeline.config.text_file import lines_of
from pipeline.data.images import (
    MAX_PIXELS,
    BadImageError,
    decode,
    looks_the_same_to_all,
    stored_extension,
)
from pipeline.data.shards.index import (
    check_empty,
    disk_faults_as_errors,
    sample_members,
    write_tar,
)
from pipeline.data.shards.members import caption_lines, caption_member
from pipeline.data.sources.account import MAX_UNREADABLE, Account
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.readable import usable_samples
from pipeline.data.sources.sample import Sample, Source, SourceOptions
from pipeline.data.storage.cache import Cache
from pipeline.data.storage.folders import Folder, folder_at, open_tars
from pipeline.data.storage.sums import content_sums
from pipeline.data.storage.tar import TarIndex
from pipeline.prompts import resolve_templates

Kind = Literal["classification", "retrieval"]

CLASSNAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
# Formats that clip_benchmark's reader decodes.
WDS_EXTENSIONS = ("webp", "png", "jpg")


@dataclass(frozen=True)
class EvalSet:
    """One opened evaluation set. Sample i is in ``tars[places[i][0]]`` as number ``places[i][1]``.

    ``labels`` holds the classes of a classification set, ``captions`` the sentences of a retrieval set; the other is
    empty. ``digest`` covers the bytes of all tars, labels, captions, class names and templates.
    """

    name: str
    kind: Kind
    classnames: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    labels: tuple[int, ...]
    captions: tuple[tuple[str, ...], ...]
    places: tuple[tuple[int, int], ...]
    tars: tuple[TarIndex, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.places)

    def key(self, i: int) -> str:
        """The name of sample i for messages: "0.tar/s0000012"."""
        tar, number = self.places[i]
        return f"{self.tars[tar].path.name}/{self.tars[tar].samples[number].key}"


def open_eval_set(location: str | Path, *, split: str = "test", cache: Cache | None = None) -> EvalSet:
    """Scan the headers and read the labels or captions of a set. Raises ConfigError with the faulty file.

    ``location``: a folder, a URL or ``hf:ORG/NAME`` (see remote.py), whose tars are copied into ``cache`` first.
    """
    folder = folder_at(location, cache)
    kind = _kind(folder)
    count = folder.read_text(f"{split}/nshards.txt")
    if count is None:
        hint = f"no {split}/nshards.txt, so it is not a clip-benchmark set" if folder.exists() else "no such folder"
        raise ConfigError(f"{folder.location}: {hint}")
    count = count.strip()
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"{folder.location}/{split}/nshards.txt: {count!r} is not a number of shards")
    _check_left_over(folder, split, int(count))
    tars = open_tars(folder, [f"{split}/{number}.tar" for number in range(int(count))])
    places = tuple((t, i) for t, tar in enumerate(tars) for i in range(len(tar)))
    classnames, templates = _lines(folder, CLASSNAMES), _lines(folder, TEMPLATES)
    if kind == "classification":
        labels, captions = tuple(_label(tars[t], i, classnames) for t, i in places), ()
    else:
        labels, captions = (), tuple(_captions(tars[t], i) for t, i in places)
    if not places:
        raise ConfigError(f"{folder.location}: its {count} shards hold no sample")
    sums = content_sums(f"{folder.location}/{split}", tars, cache or Cache.from_environment())
    content = kind, classnames, templates, labels, captions, [(tar.path.name, tar.samples) for tar in tars], sums
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    return EvalSet(folder.name, kind, classnames, templates, labels, captions, places, tars, digest)


@dataclass(frozen=True)
class PackEvalReport:
    """Result of pack_eval: the set, its source, and the account of everything in the source."""

    eval_set: EvalSet
    account: Account
    source: Source

    @property
    def left_out(self) -> list[str]:
        """ "name: reason" of each sample that is not packed."""
        return [str(each) for each in self.account.left_out]


def pack_eval(
    source: str | Path,
    out: str | Path,
    *,
    options: SourceOptions = SourceOptions(),  # noqa: B008 - frozen
    templates: str | Sequence[str] = "openai",
    split: str = "test",
    force: bool = False,
    max_unreadable: float = MAX_UNREADABLE,
    max_pixels: int = MAX_PIXELS,
    workers: int = 4,
) -> PackEvalReport:
    """Pack the user's test images as an evaluation set: classification if there are classes, otherwise retrieval.

    Unreadable images are left out and named; more than the share ``max_unreadable`` is an error, as in shards.pack.
    """
    data = read_source(source, options)
    check_empty(Path(out), force)
    good, account = usable_samples(
        data, decoded=True, max_unreadable=max_unreadable, max_pixels=max_pixels, workers=workers
    )
    if data.classes is None:
        return PackEvalReport(write_wds_eval(good, out, kind="retrieval", split=split, force=force), account, data)
    sentences = resolve_templates(templates)
    written = write_wds_eval(good, out, classnames=data.classes, templates=sentences, split=split, force=force)
    return PackEvalReport(written, account, data)


def write_wds_eval(
    samples: Iterable[Sample],
    out: str | Path,
    *,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    kind: Kind = "classification",
    split: str = "test",
    samples_per_shard: int = 10_000,
    bytes_per_shard: int = 1_000_000_000,
    as_found: bool = False,
    force: bool = False,
) -> EvalSet:
    """Write an evaluation set that this module and clip_benchmark read alike; equal samples give equal bytes.

    Image bytes are kept, except for images that clip_benchmark would see rotated, clipped or not at all (with an EXIF
    orientation, 16 bit, gif, bmp, tiff): these are stored as the upright 8-bit PNG that training sees. ``as_found``
    keeps their bytes as well, for published sets. Raises ConfigError for unreadable images.
    """
    folder = Path(out)
    check_empty(folder, force)
    listed = list(samples)
    _check_complete(folder, listed, kind, classnames, templates)
    count_file = folder / split / "nshards.txt"
    with disk_faults_as_errors(count_file):
        count_file.parent.mkdir(parents=True, exist_ok=True)
        count_file.unlink(missing_ok=True)
        for old in count_file.parent.glob("*.tar*"):
            old.unlink()
    numbered = [replace(sample, key=f"s{number:07d}") for number, sample in enumerate(listed)]
    parts = list(_parts(numbered, samples_per_shard, bytes_per_shard))
    for number, part in enumerate(parts):
        write_tar(folder / split / f"{number}.tar", part, sample_members if as_found else _members)
    with disk_faults_as_errors(count_file):
        (folder / TYPE).write_text(kind + "\n", encoding="utf-8")
        for name, lines in ((CLASSNAMES, classnames), (TEMPLATES, templates)):
            if kind == "classification" and lines is not None:
                (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        count_file.write_text(f"{len(parts)}\n", encoding="utf-8")
    return open_eval_set(folder, split=split)


def _parts(samples: Sequence[Sample], most: int, most_bytes: int) -> Iterator[list[Sample]]:
    """The samples of each shard, in order: as many as fit, at least one."""
    part: list[Sample] = []
    size = 0
    for sample in samples:
        # Images from arrays are small; only files can fill a shard before the count is reached.
        more = sample.image.stat().st_size if isinstance(sample.image, Path) else 0
        if part and (len(part) == most or size + more > most_bytes):
            yield part
            part, size = [], 0
        part.append(sample)
        size += more
    yield part


def _check_complete(
    folder: Path,
    samples: Sequence[Sample],
    kind: Kind,
    classnames: Sequence[str] | None,
    templates: Sequence[str] | None,
) -> None:
    if not samples:
        raise ConfigError(f"{folder}: no sample to write")
    if kind == "retrieval":
        without = next((sample.name for sample in samples if not sample.captions), None)
        if without is not None:
            raise ConfigError(f"{without}: a retrieval set needs a caption for each image")
        return
    if classnames is None or templates is None:
        raise ConfigError(f"{folder}: a classification set needs class names and templates")
    for sample in samples:
        if sample.cls is None or not 0 <= sample.cls < len(classnames):
            raise ConfigError(f"{sample.name}: its class {sample.cls} is none of the {len(classnames)} class names")


def _members(sample: Sample) -> dict[str, bytes]:
    """The image with label, captions or both; readers take the one for their kind."""
    data = sample.image.read_bytes()
    try:
        ext = stored_extension(sample.image.suffix, sample.image.read_bytes)
        image = decode(data, form="reference")
        if ext not in WDS_EXTENSIONS or not looks_the_same_to_all(data):
            assert isinstance(image, Image.Image)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            ext, data = "png", buffer.getvalue()
    except BadImageError as error:
        raise ConfigError(f"{sample.name}: {error}; an evaluation set leaves nothing out") from error
    members = {ext: data}
    if sample.cls is not None:
        members["cls"] = str(sample.cls).encode()
    if sample.captions:
        members["txt"] = caption_member(sample.captions)
    return members


def _check_left_over(folder: Folder, split: str, count: int) -> None:
    """Raise ConfigError for more tars than in nshards.txt, whose images would be left out silently."""
    numbers = sorted(int(name[:-4]) for name in folder.tars(split) if name[:-4].isdecimal())
    if beyond := [number for number in numbers if number >= count]:
        raise ConfigError(
            f"{folder.location}/{split}/nshards.txt: says {count}, and there is also {beyond[0]}.tar; write "
            f"{numbers[-1] + 1} into it, or remove what is left over from another set"
        )


def _kind(folder: Folder) -> Kind:
    text = (folder.read_text(TYPE) or "classification").strip().lower()
    if text == "classification" or text == "retrieval":
        return text
    raise ConfigError(
        f"{folder.location}/{TYPE}: {text!r} sets are not evaluated here, only classification and retrieval"
    )


def _lines(folder: Folder, file: str) -> tuple[str, ...] | None:
    """The lines of a small file; labels are line numbers, so a blank line is an error except at the end."""
    text = folder.read_text(file)
    if text is None:
        return None
    lines = tuple(line.strip() for line in lines_of(text.rstrip()))
    if "" in lines:
        line = lines.index("") + 1
        raise ConfigError(f"{folder.location}/{file}:{line}: a blank line between the others; remove it or fill it in")
    return lines


def _label(tar: TarIndex, number: int, classnames: Sequence[str] | None) -> int:
    raw = _member(tar, number, "cls").strip()
    if not raw.isdigit() or (classnames is not None and int(raw) >= len(classnames)):
        text = raw[:20].decode("utf-8", "replace")
        known = "" if classnames is None else f" of {len(classnames)}"
        raise ConfigError(f"{tar.name}: {tar.samples[number].key}.cls says {text!r}, which is not a class{known}")
    return int(raw)


def _captions(tar: TarIndex, number: int) -> tuple[str, ...]:
    name = f"{tar.name}: {tar.samples[number].key}.txt"
    lines = caption_lines(_member(tar, number, "txt"), name)
    if not lines:
        raise ConfigError(f"{tar.name}: {tar.samples[number].key}.txt holds no caption")
    return tuple(lines)


def _member(tar: TarIndex, number: int, ext: str) -> bytes:
    if ext not in tar.samples[number].members:
        raise ConfigError(f"{tar.name}: {tar.samples[number].key} has no .{ext} member (it has {tar.samples[number]})")
    return tar.read(number, ext)
