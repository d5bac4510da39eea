"""Samples -> tar shards beside an index.json that is the truth about them; reading that index; verifying both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import webdataset

from pipeline.config import ConfigError
from pipeline.data.formats import Format, Sample, Source, read_source
from pipeline.data.images import IMAGE_EXTENSIONS, BadImage, decode
from pipeline.data.order import seeded_permutation, stable_hash

FORMAT_NAME, FORMAT_VERSION = "selora-shards", 1
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class Shard:
    """One tar as the index records it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """A folder of shards. ``classes`` are readable names by label, None when samples carry captions only."""

    directory: Path
    shards: tuple[Shard, ...]
    samples: int
    classes: tuple[str, ...] | None
    digest: str
    source: dict[str, Any]

    def sizes(self) -> list[int]:
        return [shard.samples for shard in self.shards]


@dataclass(frozen=True)
class PackReport:
    """What pack wrote and what it left out, by name and reason."""

    index: ShardIndex
    left_out: list[str] = field(default_factory=list)


def load_index(directory: str | Path) -> ShardIndex:
    """The index of a shard folder, after a cheap check that each tar is there with the recorded size.

    Raises ConfigError that names the shard.
    """
    folder = Path(directory)
    file = folder / INDEX_NAME
    if not file.is_file():
        hint = "no such folder" if not folder.is_dir() else "no index.json in it; `selora pack SOURCE OUT` writes one"
        raise ConfigError(f"{folder}: {hint}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT_NAME or content["version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{file}: format {content['format']!r} version {content['version']} is not {FORMAT_NAME} 1"
            )
        shards = tuple(Shard(s["name"], s["samples"], s["bytes"], s["sha256"]) for s in content["shards"])
        classes = None if content["classes"] is None else tuple(content["classes"])
        index = ShardIndex(folder, shards, content["samples"], classes, content["digest"], content["source"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged: {type(error).__name__} {error}; pack the source again") from error
    if index.digest != _digest(shards, classes) or index.samples != sum(index.sizes()):
        raise ConfigError(f"{file}: digest and content disagree, so it was edited by hand; pack the source again")
    for shard in shards:
        _check_size(folder, shard)
    return index


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.name
    if not path.is_file():
        raise ConfigError(f"{path}: missing shard ({shard.samples} samples); copy it again or pack the source again")
    size = path.stat().st_size
    if size != shard.bytes:
        verb = "shorter" if size < shard.bytes else "longer"
        raise ConfigError(f"{path}: {verb} than its index: {size} bytes, {shard.bytes} recorded; copy or pack it again")


def pack(
    source: str | Path | Source,
    out: str | Path,
    *,
    format: Format = "auto",  # noqa: A002 - the word of the command line
    samples_per_shard: int | None = None,
    seed: int = 0,
    classnames: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    class_column: str | None = None,
    force: bool = False,
    check: Literal["decode", "none"] = "decode",
    max_unreadable: float = 0.01,
    max_pixels: int = 2**28,
    workers: int = 4,
) -> PackReport:
    """Writes ``source`` as shards of ``samples_per_shard`` (default: about 16 shards, 64 to 5000 samples each).

    Samples are shuffled with ``seed`` since class folders come sorted; equal input gives equal bytes. Original image bytes
    are kept. Each image is decoded once (``check``); unreadable or missing ones are left out and named in report and index,
    and more than the share ``max_unreadable`` of them is an error. index.json comes last, so a broken pack is never valid.
    """
    data = (
        source
        if isinstance(source, Source)
        else read_source(
            source,
            format,
            classnames=classnames,
            image_column=image_column,
            caption_column=caption_column,
            class_column=class_column,
        )
    )
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ConfigError(f"{folder}: not empty; give --force to write over it, or another folder")
    bad = _unreadable(data.samples, max_pixels, workers) if check == "decode" else {}
    left_out = [f"{name}: missing file or caption" for name in data.missing]
    left_out += [f"{sample.name}: {bad[sample.key]}" for sample in data.samples if sample.key in bad]
    good = [sample for sample in data.samples if sample.key not in bad]
    total = len(data.samples) + len(data.missing)
    if not good or len(left_out) > max_unreadable * total:
        listed = "\n  ".join(left_out[:20])
        raise ConfigError(
            f"{data.path}: {len(left_out)} of {total} images are unreadable or missing, more than --max-unreadable "
            f"{max_unreadable}:\n  {listed}"
        )
    order = seeded_permutation(len(good), stable_hash("pack", seed))
    per_shard = samples_per_shard or min(5000, max(64, -(-len(good) // 16)))
    described = {"format": data.format, "name": data.path.name, "seed": seed, "left_out": left_out}
    return PackReport(_write(folder, [good[i] for i in order], data.classes, per_shard, described), left_out)


def _unreadable(samples: Sequence[Sample], max_pixels: int, workers: int) -> dict[str, str]:
    """Reason by key of the images that do not decode. Decoders release the interpreter lock, so threads help."""

    def reason(sample: Sample) -> str | None:
        try:
            decode(sample.image.read_bytes(), max_pixels=max_pixels)
        except (BadImage, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(workers) as pool:
        return {s.key: why for s, why in zip(samples, pool.map(reason, samples), strict=True) if why is not None}


def _write(
    folder: Path, samples: list[Sample], classes: list[str] | None, per_shard: int, source: dict[str, Any]
) -> ShardIndex:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    for old in folder.glob("shard-*.tar"):
        old.unlink()
    shards = tuple(
        write_tar(folder / f"shard-{number:05d}.tar", samples[start : start + per_shard])
        for number, start in enumerate(range(0, len(samples), per_shard))
    )
    named = None if classes is None else tuple(classes)
    content = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "samples": len(samples),
        "digest": _digest(shards, named),
        "source": source,
        "classes": classes,
        "shards": [vars(shard) for shard in shards],
    }
    temporary = folder / (INDEX_NAME + ".part")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / INDEX_NAME)
    return load_index(folder)


def write_tar(path: Path, samples: Sequence[Sample]) -> Shard:
    """One shard, under a temporary name until it is complete. Equal samples give equal bytes."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        with webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
            for sample in samples:
                writer.write({"__key__": sample.key, **sample_members(sample)})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return Shard(path.name, len(samples), path.stat().st_size, sha256_of(path))


def sample_members(sample: Sample) -> dict[str, bytes]:
    """The files of one sample by extension: the image as it was, ``cls`` and ``txt`` where there is one."""
    members = {IMAGE_EXTENSIONS[sample.image.suffix[1:].lower()]: sample.image.read_bytes()}
    if sample.cls is not None:
        members["cls"] = str(sample.cls).encode()
    if sample.captions:
        # A caption is a line, so its own line breaks are escaped as clip-benchmark does.
        members["txt"] = "\n".join(text.replace("\n", "\\n") for text in sample.captions).encode()
    return members


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(shards: Sequence[Shard], classes: Sequence[str] | None) -> str:
    """Equal for equal shards and class names, whatever the folder is called."""
    content = [[shard.name, shard.samples, shard.sha256] for shard in shards], classes
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
